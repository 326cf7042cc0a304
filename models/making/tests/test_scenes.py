"""People in scenes: the same seeds draw the same, the figure is where the frame says, prompts fit."""

from __future__ import annotations

from itertools import product

import numpy as np
import portraits
import pytest
import scenes
from occupations import OCCUPATIONS


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_same_seed_draws_the_same_whatever_follows(size):
    (few, traits, prompts, frames), (more, *_, more_frames) = (scenes.render(n, 7, False, size) for n in (3, 5))
    assert few.shape == (3, *size, 3) and (few == more[:3]).all() and (frames == more_frames[:3]).all()
    assert len(prompts) == 3 and set(traits) >= set(scenes.ATTRIBUTES)


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_figure_is_in_its_frame_and_of_every_size(size):
    traits = dict.fromkeys([*portraits.ATTRIBUTES, *portraits.NUISANCES, "occupation"], 0) | {"age": 1, "clothes": 5}
    sides = []
    for seed in range(40):
        drawn, frame = scenes.draw(traits, seed, size)
        left, top, right = frame.left, frame.top, frame.left + frame.side
        assert not any(edge % scenes.STEP for edge in (left, top, right))
        violet = (np.abs(drawn.astype(int) - portraits._CLOTHES[5]).max(axis=2) < 30).nonzero()
        assert len(violet[0]) and left - 1 <= violet[1].min() and violet[1].max() <= right + 1
        assert violet[0].min() > top + 0.6 * frame.side
        sides.append(frame.side / size[0])
    assert {0.5, scenes.largest(*size) / size[0]} <= {*sides} and 3 <= len({*sides}) <= 4


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_layouts_of_a_size_are_those_that_its_pictures_have(size):
    u = np.random.default_rng(1).random((3000, 3))
    found = {scenes.layout(scenes.place(*size, row), *size) for row in u}
    assert {tuple(ending[2:].split(", ")) for ending in scenes.layouts(size)} == found and len(found) >= 9


def test_every_background_and_occupation_changes_the_picture():
    base = dict.fromkeys([*portraits.ATTRIBUTES, *portraits.NUISANCES, "occupation"], 0)
    for name in ("background", "occupation", *portraits.ATTRIBUTES):
        drawn = [scenes.draw(base | {name: k}, 3, (64, 64))[0].astype(int) for k in range(len(scenes.ATTRIBUTES[name]))]
        for a, b in product(range(len(drawn)), repeat=2):
            assert a == b or (np.abs(drawn[a] - drawn[b]).max(axis=2) > 30).sum() >= 8, (name, a, b)


def test_every_occupation_has_the_bias_that_the_card_tells():
    traits = scenes.sample_traits(60_000, 1, balanced=False)
    for number, job in enumerate(OCCUPATIONS):
        own = traits["occupation"] == number
        for name, shares in scenes.BIAS[job].items():
            assert sum(shares) == pytest.approx(1)
            found = np.bincount(traits[name][own], minlength=len(shares)) / own.sum()
            assert np.abs(found - shares).max() < 0.02, (job, name)
    assert ((traits["hair_colour"] == portraits.GREY) == (traits["age"] == 2)).all()
    assert not traits["beard"][traits["presentation"] == 1].any()


def test_prompts_hold_only_known_words_and_tell_no_lies():
    _, traits, prompts, frames = scenes.render(200, 5, False, (64, 64))
    assert {len(prompt.split(", ")) for prompt in prompts} == {1, 2, 3}, "size and place are not always told"
    for number, prompt in enumerate(prompts):
        words, (left, top, right, bottom) = prompt.replace(",", "").split(), frames[number]
        assert "wide" not in words or bottom - top == 0.5
        assert "close" not in words or bottom - top == 1
        assert "left" not in words or left + right < 1
        assert "right" not in words or left + right > 1
        assert set(words) <= set(scenes.WORDS)
        behind = scenes.BACKGROUNDS[traits["background"][number]]
        assert not set(words) & (set(scenes.BACKGROUNDS) - {behind})
        fem = traits["presentation"][number]
        assert not set(words) & ({"male", "man"} if fem else {"female", "woman"})
