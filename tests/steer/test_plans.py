"""Plans: as few pictures as possible change."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflens_core.classifiers import NO_CLASS
from difflens_core.files import DiffLensError
from difflens_core.steer import plan_in_words, plan_moves, planned_targets
from difflens_core.targets import LEFT_ALONE, assign_targets, joint_shares

CLASSES = ("Young", "adult", "senior")
MIXES = st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(any).map(lambda w: np.array(w) / sum(w))
SEEDS = st.integers(0, 2**32)


def own_labels(count: int, seed: int, starts: tuple = ((0.8, 0.2), (0.2, 0.7, 0.1))) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(len(start), count, p=start) for start in starts], axis=1)


@given(st.integers(1, 60), SEEDS, MIXES)
@settings(max_examples=40, deadline=None)
def test_a_plan_meets_the_quotas_and_changes_no_more_pictures_than_must(count, seed, mix):
    own = np.random.default_rng(seed).integers(len(mix), size=(count, 1))
    asked = plan_moves(own, mix, seed % 1000)
    given_, wanted = (np.bincount(labels.ravel(), minlength=len(mix)) for labels in (own, asked))
    assert (wanted == np.bincount(assign_targets(mix, count, seed % 1000), minlength=len(mix))).all()
    assert (asked != own).sum() == np.abs(given_ - wanted).sum() / 2  # the total variation distance


@pytest.mark.parametrize("seed", range(4))
def test_a_joint_plan_changes_the_fewest_pictures_and_then_the_fewest_classes(seed):
    """Against every way to hand out the combinations to six pictures."""
    own, shares = own_labels(6, seed), joint_shares([np.array([0.5, 0.5]), np.full(3, 1 / 3)])
    asked = plan_moves(own, shares, 0)
    best = min(
        ((np.array(order) != own).any(axis=1).sum(), (np.array(order) != own).sum())
        for order in itertools.permutations(map(tuple, asked))
    )
    assert ((asked != own).any(axis=1).sum(), (asked != own).sum()) == best


def test_a_joint_plan_makes_every_combination_equally_frequent():
    own = own_labels(600, 3)
    asked = plan_moves(own, joint_shares([np.full(2, 1 / 2), np.full(3, 1 / 3)]), 1)
    assert (np.bincount(asked[:, 0] * 3 + asked[:, 1], minlength=6) == 100).all()
    given_ = np.bincount(own[:, 0] * 3 + own[:, 1], minlength=6)
    assert (asked != own).any(axis=1).sum() == np.abs(given_ - 100).sum() / 2


def test_pictures_that_fit_are_left_alone_and_the_others_held_in_all_attributes():
    own = own_labels(90, 4)
    read = {"look": own[:, 0], "age": own[:, 1]}
    classes = {"look": ("a", "b"), "age": CLASSES}
    targets = planned_targets(read, classes, {"look": np.full(2, 0.5), "age": np.full(3, 1 / 3)}, 0)
    moved = (np.stack([part.asked for part in targets], axis=1) != own).any(axis=1)
    for part in targets:
        steered = part.of(torch.arange(90)).numpy()
        assert (steered[moved] == part.asked[moved]).all() and (steered[~moved] == LEFT_ALONE).all()
        assert (part.first(90)[~moved] == read[part.attribute][~moved]).all()
    assert plan_in_words(targets, read).startswith(f"{moved.sum()} of 90 pictures change")


def test_a_plan_is_read_in_parts_and_says_when_it_ends():
    (targets,) = planned_targets({"age": np.zeros(9, int)}, {"age": CLASSES}, {"age": np.full(3, 1 / 3)}, 0)
    later = replace(targets, first_image=6)
    assert later.first(3).tolist() == targets.first(9)[6:].tolist()
    assert later.of(torch.arange(3)).tolist() == targets.of(torch.arange(6, 9)).tolist()
    with pytest.raises(DiffLensError, match="holds 9 pictures, the run has 10"):
        targets.first(10)


def test_pictures_without_a_face_are_left_alone_and_not_planned_for():
    own = own_labels(60, 5)
    faces = np.arange(60) % 4 != 1
    read = {"look": np.where(faces, own[:, 0], NO_CLASS), "age": np.where(faces, own[:, 1], NO_CLASS)}
    classes, shares = {"look": ("one", "other"), "age": CLASSES}, {"look": np.full(2, 1 / 2), "age": np.full(3, 1 / 3)}
    targets = planned_targets(read, classes, shares, 1)
    only = planned_targets({name: labels[faces] for name, labels in read.items()}, classes, shares, 1)
    for part, expected in zip(targets, only, strict=True):
        assert (part.asked[faces] == expected.asked).all() and not part.moved[~faces].any()
        assert (part.of(torch.arange(60))[~faces] == LEFT_ALONE).all()
    words = plan_in_words(targets, read)
    assert words.startswith(f"{only[0].moved.sum()} of 45 pictures change")
    assert "No face was found in 15 of 60 pictures; they do not count." in words
    with pytest.raises(DiffLensError, match="no face was found in any of the 60"):
        planned_targets({name: np.full(60, NO_CLASS) for name in read}, classes, shares, 1)
