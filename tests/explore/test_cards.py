"""What the page is told of each feature, and the pictures that go with it."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from difflens_core.explore import (
    as_jpeg,
    best_first,
    cards,
    feature_table,
    lit,
    observe,
    recipe_to_choose_from,
    sheets,
    thumbnails,
)

LABELS = torch.arange(12) % 3


@pytest.fixture
def told(toys):
    info = {"named": {"3": {"name": "</script><b>"}}, "ranking": "amplify", "scores": [1.0, 2, 3, 4, 5]}
    recipe, activations = replace(toys.recipe(), info=info), toys.activations()
    activity = observe(recipe, activations, LABELS, 3)
    return recipe, activity, cards(recipe, activity, LABELS, recipe.classes, activations.progress, True)


def numbers(text: str, kind: str = "u1") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_cards_say_what_was_observed(told):
    recipe, activity, found = json.loads(json.dumps(told[2])) and told
    assert [card["id"] for card in found["features"]] == recipe.features.tolist() and found["pictures"] == [4, 4, 4]
    for row, card in enumerate(found["features"]):
        assert [activity.shown[at] for at in card["top"]] == activity.top[row].tolist()
        assert np.allclose(card["activity"], activity.by_class[row], atol=1e-4)
        assert card["of"] == recipe.member[:, row].nonzero().flatten().tolist() and card["score"] == row + 1
        assert (card["on"], card["weight"], card["group"]) == (True, 1.0, "")
    assert [card["name"] for card in found["features"]] == ["", "", "", "</script><b>", ""]


def test_the_maps_are_those_of_the_features(told):
    _, activity, found = told
    heat = numbers(found["heat"]).reshape(5, 6, 2, 2) / 255
    assert np.allclose(heat, (activity.heat / activity.peak[:, :1, None, None]).clamp(0, 1), atol=1 / 500)
    shape = (found["shown"], 2, 2, 5)
    places = numbers(found["places"], "<u2").reshape(shape)
    strength = numbers(found["strength"]).reshape(shape) / 255
    for at, picture in enumerate(activity.shown.tolist()):
        assert np.array_equal(places[at], activity.strongest[picture])
        largest = activity.peak[:, 0][activity.strongest[picture]]
        assert np.allclose(strength[at], (activity.strength[picture] / largest).clamp(0, 1), atol=1 / 500)


def test_the_table_has_the_best_first(told):
    recipe, activity, found = told
    lines = feature_table(recipe, activity, found).splitlines()
    order = best_first(found)
    assert [line.split()[0] for line in lines[1:]] == [f"#{found['features'][row]['id']}" for row in order]
    told_by = [max(found["features"][row]["tells"]) for row in order]
    assert told_by == sorted(told_by, reverse=True)


def test_of_an_sae_those_that_tell_a_class_are_taken_for_it(toys, monkeypatch):
    sae, activations = toys.sae(), toys.activations()
    own = torch.zeros(12, 20)
    for step in range(3):
        latents = sae.encode(activations.values[step], step)
        own += torch.zeros(12, 4, 20).scatter_(2, latents.indices, latents.values).mean(dim=1)
    monkeypatch.setattr("difflens_core.explore.of_sae.SHOWN", 8)
    recipe = recipe_to_choose_from(sae, activations, LABELS, "age", toys.classes)
    assert recipe.classes == toys.classes and len(recipe.features) == 8 and recipe.needs_sae
    assert recipe.member.sum(dim=0).tolist() == [1] * 8, "each is for one class"
    without = recipe_to_choose_from(sae, activations, LABELS[:0], "", ())
    assert without.features.tolist() == sorted(own.sum(dim=0).topk(8).indices.tolist())


def test_pictures_become_small_and_stand_side_by_side():
    images = torch.linspace(0, 1, 300)[:, None, None, None].expand(300, 256, 128, 3)
    small = thumbnails(images, torch.tensor([0, 299, 150]))
    assert small.shape == (3, 128, 64, 3) and small[:, 5, 5, 0].tolist() == [0, 255, 128]
    assert thumbnails(images[:, :64, :64], torch.tensor([1])).shape == (1, 64, 64, 3), "never enlarged"
    whole = np.repeat(np.arange(300).astype(np.uint8)[:, None, None, None], 3, axis=3) * np.ones((1, 4, 2, 1), np.uint8)
    made = sheets(whole)
    assert [sheet.shape for sheet in made] == [(64, 32, 3), (12, 32, 3)]
    assert made[0][4 * 3 + 1, 2 * 5, 0] == 3 * 16 + 5 and made[1][4, 2, 0] == (256 + 17) % 256
    assert Image.open(io.BytesIO(as_jpeg(made[0]))).size == (32, 64)


def test_a_picture_is_light_where_a_feature_fires():
    grey, heat = np.full((64, 64, 3), 128, np.uint8), torch.zeros(8, 8)
    heat[1, 6] = 1
    shown = lit(grey, heat)
    brightest = np.unravel_index(shown.sum(axis=2).argmax(), (64, 64))
    assert 8 <= brightest[0] < 16 and 48 <= brightest[1] < 56
    assert shown[60, 4].max() < 60 < 128 < shown[brightest][0]
