"""Steer one attribute, watch the others, on a toy model."""

from __future__ import annotations

import pytest
import torch
from toy import CLASSES, UNIFORM, Toy, recipe

from difflens_core.classifiers.readings import NO_FACE
from difflens_core.experiments import cross_effects
from difflens_core.experiments.cross_effects import TOGETHER, shuffled
from difflens_core.files import DiffLensError
from difflens_core.report import cross_chart, cross_table
from difflens_core.steer import Steering
from difflens_core.targets import Targets


def test_cross_effects_tell_a_clean_recipe_from_one_that_leaks():
    attributes = {"age": CLASSES, "tone": CLASSES}
    told: list[list] = []
    for leak, low, high in ((0.0, 0.0, 0.05), (0.9, 0.2, 1.0)):
        recipes = [recipe(attribute="age", leak=leak), recipe(attribute="tone", first=3)]
        told.clear()
        found = cross_effects(
            recipes, Toy(), Toy.classify, attributes, 120, 32, on_found=lambda rows: told.append([*rows])
        )
        assert told == [found[:2], found[:4], found]
        rows = {(row.steered, row.watched): row for row in found}
        assert rows.keys() == {(s, w) for s in ("age", "tone", TOGETHER) for w in ("age", "tone")}
        assert rows["age", "age"].asked and not rows["age", "tone"].asked and rows[TOGETHER, "tone"].asked
        assert low <= rows["age", "tone"].share <= high and rows["tone", "age"].share < 0.05
        assert rows["tone", "tone"].share > 0.95 and 60 < rows["age", "age"].pictures < 120
        for row in found:
            assert row.interval[0] - 1e-9 <= row.share <= row.interval[1] + 1e-9
        assert cross_chart(found).shape == (440, 720, 3)
        text = cross_table(found)
        assert f"*{100 * rows['age', 'age'].share:.0f}" in text and len(text.splitlines()) == 5


def test_cross_effects_count_as_by_hand_and_tell_their_progress():
    toy, seen = Toy(), []
    attributes = {"age": CLASSES, "tone": CLASSES}
    (own, other) = cross_effects(
        [recipe(leak=0.9)], toy, toy.classify, attributes, 50, 20, lambda *done: seen.append(done)
    )
    assert seen[-1] == (100, 100) and len(seen) == 6
    base = toy([], torch.arange(50))
    targets, order = Targets("age", CLASSES, tuple(UNIFORM)), shuffled(50)
    after = toy([Steering(recipe(leak=0.9), lambda images: targets.of(order[images]))], torch.arange(50))
    ages, tones = ([toy.classify(p)[name].argmax(1) for p in (base, after)] for name in ("age", "tone"))
    moved = ages[0] != torch.from_numpy(targets.first(50))[order]
    assert own.share == pytest.approx(
        float((ages[1] == torch.from_numpy(targets.first(50))[order])[moved].float().mean())
    )
    assert other.share == pytest.approx(float((tones[0] != tones[1])[moved].float().mean()))
    mixes = [torch.bincount(labels, minlength=3) / 50 for labels in tones]
    assert other.drift == pytest.approx(float((mixes[1] - mixes[0]).abs().sum() / 2))


def test_pictures_without_a_face_before_or_after_do_not_count():
    attributes, rounds = {"age": CLASSES, "tone": CLASSES}, []

    def classify(pictures):
        """Of the 50 pictures as they are the first 5 have no face, of the steered ones the last 3."""
        gone = torch.zeros(len(pictures))
        gone[slice(0, 5) if not rounds else slice(47, 50)] = 1
        rounds.append(len(pictures))
        return Toy.classify(pictures) | {NO_FACE: gone}

    toy = Toy()
    own, other = cross_effects([recipe(leak=0.9)], toy, classify, attributes, 50, 50)
    targets, order = Targets("age", CLASSES, tuple(UNIFORM)), shuffled(50)
    before = toy([], torch.arange(50))
    after = toy([Steering(recipe(leak=0.9), lambda images: targets.of(order[images]))], torch.arange(50))
    ages, tones = ([toy.classify(p)[name].argmax(1)[5:47] for p in (before, after)] for name in ("age", "tone"))
    asked = torch.from_numpy(targets.first(50))[order][5:47]
    moved = ages[0] != asked
    assert own.uncounted == other.uncounted == 8 and own.pictures == other.pictures == int(moved.sum())
    assert own.share == pytest.approx(float((ages[1] == asked)[moved].float().mean()))
    mixes = [torch.bincount(labels, minlength=3) / 42 for labels in tones]
    assert other.drift == pytest.approx(float((mixes[1] - mixes[0]).abs().sum() / 2))
    assert "Without a face, before or after, are up to 8 pictures" in cross_table([own, other])


def test_where_nothing_else_can_be_watched_nothing_is_drawn():
    toy = Toy()
    with pytest.raises(DiffLensError, match="knows nothing but age"):
        cross_effects([recipe()], toy, toy.classify, {"age": CLASSES}, 10)
    assert not toy.drawn
