"""Building a recipe: gates that imitate TopK, membership, and captures with another number of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.sae import NORMALISATION
from difflens_core.steer import Steering, load_recipe, save_recipe, with_settings
from difflens_core.steer.recipe_files import LARGE, PLAIN, TENSORS, as_stored


def test_settings_change_a_copy(toys):
    recipe = toys.recipe()
    changed = with_settings(recipe, strength=2, mode="move", start=0.1, end=0.9)
    assert (changed.strength, changed.mode, changed.start, changed.end) == ((2.0,) * 3, "move", 0.1, 0.9)
    assert with_settings(recipe, strength=(3.0, 0.0, 1.0)).strength == (3.0, 0.0, 1.0)
    assert recipe.mode == "shift" and recipe.strength == (1.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mode": "push"}, "'push' is unknown"), ({"strength": (1.0,)}, "1 strengths for 3 classes")],
)
def test_a_recipe_that_cannot_steer_is_refused(toys, change, message):
    with pytest.raises(DiffLensError, match=message):
        replace(toys.recipe(), **change)


def test_what_is_stored_is_what_was_in_memory_once_it_is_rounded(toys, tmp_path):
    recipe = as_stored(replace(toys.recipe(), levels=toys.levels()))
    save_recipe(tmp_path / "r.safetensors", recipe)
    found, h = load_recipe(tmp_path / "r.safetensors"), toys.activations(pictures=8).values[1]
    edited = [Steering(own, lambda images: images % 3)(h, 0.4, torch.arange(8)) for own in (recipe, found)]
    torch.testing.assert_close(*edited, atol=1e-5, rtol=1e-5)


def test_round_trip(toys, tmp_path):
    recipe = toys.recipe(mode="move", start=0.1, end=0.8, strength=(2.0, 0.0, 1.5), hold=True, info={"pictures": 12})
    path = tmp_path / "r.safetensors"
    save_recipe(path, recipe)
    found = load_recipe(path)
    for name in TENSORS:
        expected = getattr(recipe, name)
        half_a_unit = float(expected.abs().max()) / 253 if name in LARGE else 1e-6
        torch.testing.assert_close(getattr(found, name), expected, atol=half_a_unit, rtol=0)
    for name in PLAIN:
        assert getattr(found, name) == getattr(recipe, name)
    assert all(torch.equal(getattr(found.normalisation, n), getattr(recipe.normalisation, n)) for n in NORMALISATION)


@pytest.mark.parametrize(
    "damage",
    [
        {"classes": None}, {"classes": 3}, {"strength": "abc"}, {"strength": [None] * 3},
        {"strength": [float("nan")] * 3},
        {"start": "soon"}, {"end": None}, {"mode": ["shift"]}, {"map": 7}, {"traits": [1]}, {"info": "much"},
        {"further": 5}, {"further": [3]}, {"further": "site"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_another_kind_are_refused_in_one_sentence(toys, tmp_path, damage):
    path = tmp_path / "r.safetensors"
    save_recipe(path, toys.recipe())
    tensors, info = load_tensors(path, "recipe")
    save_tensors(path, "recipe", tensors, info | damage)
    with pytest.raises(DiffLensError, match="r.safetensors: .*(damaged|unknown|cannot)") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
