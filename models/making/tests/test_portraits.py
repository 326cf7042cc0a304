"""The avatars' renderer: the same seeds draw the same portraits, with the bias that was built in."""

from __future__ import annotations

from itertools import product

import numpy as np
import portraits
import pytest

NAMES = {**portraits.ATTRIBUTES, **portraits.NUISANCES}


@pytest.mark.parametrize("balanced", [True, False])
def test_the_same_seed_draws_the_same_portraits(balanced):
    (first, traits), (second, again), (other, _) = (portraits.render(5, seed, balanced) for seed in (3, 3, 4))
    assert (first == second).all() and (first != other).any()
    assert first.shape == (5, 64, 64, 3) and first.dtype == np.uint8
    assert all((traits[name] == again[name]).all() for name in NAMES)


@pytest.mark.parametrize("balanced", [True, False])
def test_a_portrait_does_not_depend_on_how_many_follow(balanced):
    (few, few_traits), (more, more_traits) = (portraits.render(n, 7, balanced) for n in (3, 8))
    assert (few == more[:3]).all()
    assert all((few_traits[name] == more_traits[name][:3]).all() for name in NAMES)


def assert_shares(labels: np.ndarray, shares: np.ndarray) -> None:
    """Counts lie within five standard errors of what `shares` predicts."""
    found = np.bincount(labels, minlength=len(shares)) / len(labels)
    error = np.sqrt(np.asarray(shares) * (1 - np.asarray(shares)) / len(labels))
    assert (np.abs(found - shares) <= 5 * error).all(), (found, shares)


def test_balanced_traits_are_uniform_and_independent():
    traits = portraits.sample_traits(40_000, 1, balanced=True)
    for name, classes in NAMES.items():
        assert_shares(traits[name], np.full(len(classes), 1 / len(classes)))
    for a, b in product(portraits.ATTRIBUTES, NAMES):
        if a != b:
            size = len(NAMES[a]) * len(NAMES[b])
            assert_shares(traits[a] * len(NAMES[b]) + traits[b], np.full(size, 1 / size))


def test_biased_traits_have_the_documented_shares():
    traits = portraits.sample_traits(40_000, 2, balanced=False)
    for name, shares in portraits.BIAS.items():
        assert sum(shares) == pytest.approx(1) and max(shares) > 1.5 / len(shares)
        assert_shares(traits[name], np.array(shares))
    pairs = np.outer(portraits.BIAS["presentation"], portraits.BIAS["skin_tone"]).flatten()
    assert_shares(traits["presentation"] * 4 + traits["skin_tone"], pairs)
    assert_shares(traits["glasses"], np.array([0.75, 0.25]))
    may = (traits["presentation"] == 0) & (traits["age"] != 0)
    assert_shares(traits["beard"][may], np.array([0.7, 0.3]))
    assert not traits["beard"][~may].any()
    hair = portraits.grey_seniors(traits)["hair_colour"]
    assert ((hair == portraits.GREY) == (traits["age"] == 2)).all()
    assert_shares(hair[traits["age"] != 2], np.full(4, 1 / 4))


def test_every_combination_of_traits_draws_and_none_looks_like_another():
    shapes = [name for name in NAMES if name not in ("background", "clothes")]
    seen = {}
    for i, values in enumerate(product(*(range(len(NAMES[name])) for name in shapes))):
        traits = dict(zip(shapes, values, strict=True), background=i % 6, clothes=i // 6 % 6)
        image = portraits.draw(traits, seed=i % 10)
        assert image.shape == (64, 64, 3) and image.std() > 20
        seen[image.tobytes()] = traits
    assert len(seen) == 2 * 3 * 4 * 5 * 2 * 2 * 3


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_a_trait_changes_the_picture(name):
    base = dict.fromkeys(NAMES, 0) | {"age": 1}
    drawn = [portraits.draw(base | {name: value}, 0).astype(int) for value in range(len(NAMES[name]))]
    for i, j in product(range(len(drawn)), repeat=2):
        assert i == j or (np.abs(drawn[i] - drawn[j]).max(axis=-1) > 30).sum() >= 8, (NAMES[name][i], NAMES[name][j])
