"""The drawings of people at work: the same seeds draw and say the same, and a prompt fits what it tells of."""

from __future__ import annotations

import numpy as np
import portraits
import prompted_portraits
from occupations import OCCUPATIONS


def test_the_same_seed_draws_the_same_and_says_the_same():
    (few, traits, prompts), (more, more_traits, more_prompts) = (
        prompted_portraits.render(n, 7, balanced=False) for n in (3, 6)
    )
    assert (few == more[:3]).all() and prompts == more_prompts[:3]
    assert all((values == more_traits[name][:3]).all() for name, values in traits.items())


def test_every_occupation_has_the_bias_that_the_card_tells():
    traits = prompted_portraits.sample_traits(60_000, 1, balanced=False)
    for number, job in enumerate(OCCUPATIONS):
        own = traits["occupation"] == number
        assert abs(own.mean() - 1 / len(OCCUPATIONS)) < 0.01
        for name, shares in prompted_portraits.BIAS[job].items():
            found = np.bincount(traits[name][own], minlength=len(shares)) / own.sum()
            assert np.abs(found - shares).max() < 0.02, (job, name)


def test_balanced_drawings_tell_nothing_about_one_another():
    traits = prompted_portraits.sample_traits(60_000, 2, balanced=True)
    for name, classes in portraits.ATTRIBUTES.items():
        cells = np.bincount(traits["occupation"] * len(classes) + traits[name]) / 60_000
        assert np.abs(cells - 1 / (len(OCCUPATIONS) * len(classes))).max() < 0.006


def test_a_prompt_says_what_the_drawing_shows():
    _, traits, prompts = prompted_portraits.render(300, 5, balanced=False)
    told = set()
    for i, prompt in enumerate(prompts):
        words = prompt.split()
        assert set(words) <= set(prompted_portraits.WORDS), prompt
        told |= set(words)
        if traits["occupation"][i]:
            assert OCCUPATIONS[traits["occupation"][i]] in words
        else:
            assert {"person", ("man", "woman")[traits["presentation"][i]]} & set(words)
        for word, name, value in (
            ("female", "presentation", 1), ("male", "presentation", 0), ("young", "age", 0), ("adult", "age", 1),
            ("old", "age", 2), ("senior", "age", 2), ("glasses", "glasses", 1),
        ):  # fmt: skip
            assert word not in words or traits[name][i] == value, prompt
        assert "smiling" not in words or traits["expression"][i] > 0
    assert told == set(prompted_portraits.WORDS)
