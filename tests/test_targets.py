"""Target mixes: what users may type, and how classes are dealt to pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from difflens_core.files import DiffLensError
from difflens_core.targets import Targets, assign_targets, parse_numbers, parse_target, targets_of

CLASSES = ("Young", "adult", "senior")
MIXES = st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(any).map(lambda w: np.array(w) / sum(w))
SEEDS = st.integers(0, 2**32)


@given(MIXES, SEEDS)
@example(np.array([1, 15, 42, 6, 42]) / 106, 0)
@example(np.array([1, 15, 42, 6, 42]) / 106, 1)
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_one_picture_of_the_quota_of_every_class(shares, seed):
    dealt = np.cumsum(np.eye(len(shares))[assign_targets(shares, 120, seed)], axis=0)
    quota = np.outer(np.arange(1, 121), shares)
    # No deal can promise less than 1 - 1 / (2K - 2) (Tijdeman 1980, the chairman assignment problem).
    assert np.abs(dealt - quota).max() <= 1 - 1 / (2 * len(shares) - 2) + 1e-6


@given(MIXES, SEEDS, st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_a_prefix_does_not_depend_on_how_many_pictures_follow(shares, seed, count):
    assert (assign_targets(shares, 40, seed)[:count] == assign_targets(shares, count, seed)).all()


def test_uniform_rounds_hold_each_class_once_in_an_order_that_varies():
    rounds = assign_targets(np.full(4, 0.25), 400, 3).reshape(100, 4)
    assert (np.sort(rounds, axis=1) == np.arange(4)).all()
    assert len({tuple(one) for one in rounds}) > 10


def test_the_seed_and_nothing_else_decides_the_order():
    deals = [assign_targets(np.full(3, 1 / 3), 60, seed).tolist() for seed in (0, 0, 1)]
    assert deals[0] == deals[1] != deals[2]


def test_a_class_without_share_is_never_dealt_and_a_full_share_always():
    assert 1 not in assign_targets(np.array([0.3, 0.0, 0.7]), 200, 0)
    assert set(assign_targets(np.array([0.0, 1.0]), 50, 0)) == {1}
    assert set(assign_targets(np.array([1.0]), 5, 0)) == {0}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_of_any_size_get_the_same_classes(size):
    targets = Targets("age", CLASSES, (0.5, 0.2, 0.3), seed=5, first_image=7)
    parts = [targets.of(part) for part in torch.arange(24).split(size)]
    expected = assign_targets(np.array([0.5, 0.2, 0.3]), 31, 5)[7:]
    assert torch.cat(parts).tolist() == expected.tolist() == targets.first(24).tolist()


def test_pictures_may_be_asked_for_in_any_order():
    targets = Targets("age", CLASSES, (0.5, 0.2, 0.3))
    assert targets.of(torch.tensor([9, 2, 2])).tolist() == targets.first(10)[[9, 2, 2]].tolist()


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("uniform", [1, 1, 1]),
        ("", [1, 1, 1]),
        (" Uniform\n", [1, 1, 1]),
        ("young", [1, 0, 0]),
        ("SENIOR", [0, 0, 1]),
        ("0.7, 0.2, 0.1", [7, 2, 1]),
        ("7 2 1", [7, 2, 1]),
        ("1;0;3", [1, 0, 3]),
        ("young: 1, senior: 3", [1, 0, 3]),
        ("Adult:2", [0, 1, 0]),
    ],
)
def test_a_target_can_be_typed_in_every_documented_form(text, shares):
    np.testing.assert_allclose(parse_target(text, CLASSES), np.array(shares) / sum(shares))


@pytest.mark.parametrize(
    "text",
    ["old", "1 2", "1 2 3 4", "-1 1 1", "0 0 0", "nan 1 1", "inf 1 1", "young: 1, old: 2", "young: x", "a:b:c", ","],
)
def test_a_target_that_makes_no_mix_is_refused_with_the_classes(text):
    with pytest.raises(DiffLensError, match="Young, adult, senior"):
        parse_target(text, CLASSES)


def test_numbers_for_each_class_are_one_for_all_or_one_each_in_order():
    assert parse_numbers(" 0.5 ", CLASSES, "strength") == [0.5] * 3
    assert parse_numbers("30, 0 -50.5", CLASSES, "strength") == [30, 0, -50.5]
    assert parse_numbers("10,0;30", CLASSES, "features", int) == [10, 0, 30]


@pytest.mark.parametrize("text", ["", "1, 2", "1 2 3 4", "a", "nan", "inf, 1, 1"])
def test_other_numbers_are_refused_with_the_classes_in_order(text):
    with pytest.raises(DiffLensError, match=r'strength ".*" is not understood.* 3 in the order Young, adult, senior'):
        parse_numbers(text, CLASSES, "strength")
    for odd in ("1.5", "1, -2, 3"):
        with pytest.raises(DiffLensError, match="Expected a whole number for all, or 3"):
            parse_numbers(odd, CLASSES, "features", int)


def test_targets_are_found_by_attribute_and_classes():
    parts = [Targets("age", CLASSES, (1.0, 0.0, 0.0)), Targets("look", ("a", "b"), (0.5, 0.5))]
    assert targets_of(parts, "look", ("a", "b")) is parts[1]
    with pytest.raises(DiffLensError, match="those of look \\(b, a\\) are needed"):
        targets_of(parts, "look", ("b", "a"))
