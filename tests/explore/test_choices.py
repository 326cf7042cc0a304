"""What a person chose among a recipe's features, applied, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from difflens_core.explore import Wish, chosen, parse_choice
from difflens_core.files import DiffLensError
from difflens_core.steer import Steering, as_stored, joined, load_recipe, save_recipe


def test_what_the_explorer_writes_is_read():
    text = json.dumps({"features": {"3": {"on": False}, "4": {"weight": 0.5, "name": " a  <b> ", "group": "hair"}}})
    assert parse_choice(text) == {3: Wish(on=False), 4: Wish(weight=0.5, name="a <b>", group="hair")}
    assert parse_choice("  ") == {} == parse_choice('{"features": {}}')


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "7", "null", "{}", '{"features": []}', '{"features": {"x": {}}}', '{"features": {"1": 2}}',
        '{"features": {"1": {"on": 1}}}', '{"features": {"1": {"weight": NaN}}}', '{"features": {"1": {"name": {}}}}',
        '{"features": {"1": {"weight": 1e9}}}',
        '{"features": {"1": {"weight": true}}}', '{"features": {"1": {"colour": 1}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence(text):
    with pytest.raises(DiffLensError, match=r"^choice is not what the explorer writes \(.*\)\. Empty it") as caught:
        parse_choice(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_nothing_wished_changes_nothing(toys):
    recipe = toys.recipe()
    found = chosen(recipe, "middle", {})
    assert all(torch.equal(getattr(found, name), getattr(recipe, name)) for name in ("features", "decoder", "member"))
    assert found.weight is None and found.info == recipe.info


def edit(recipe, h: torch.Tensor) -> torch.Tensor:
    return Steering(recipe, lambda images: images % 3)(h, 0.5, torch.arange(len(h))) - h


@pytest.mark.parametrize("mode", ["shift", "add fixed", "move", "scale"])
def test_a_chosen_recipe_makes_the_change_of_its_features_alone(toys, mode):
    """Against weights of 0 for what is not ticked: every mode but reach, which looks at all features, is a sum."""
    recipe, h = toys.recipe(mode=mode), toys.activations().values[1]
    weights = torch.tensor([0.0, 1, 0.5, 0, 2])
    wishes = {0: Wish(on=False), 2: Wish(weight=0.5), 3: Wish(on=False), 4: Wish(weight=2.0)}
    found = chosen(recipe, "middle", wishes)
    assert found.features.tolist() == [1, 2, 4] and found.weight.tolist() == [1.0, 0.5, 2.0]
    change = edit(found, h)
    torch.testing.assert_close(change, edit(replace(recipe, weight=weights), h))
    assert (change - edit(recipe, h)).abs().max() > 0.1


def test_weights_are_absolute_and_keep_those_of_the_recipe(toys):
    recipe = replace(toys.recipe(), weight=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    found = chosen(recipe, "middle", {1: Wish(on=False), 2: Wish(weight=1.5)})
    torch.testing.assert_close(found.weight, torch.tensor([0.9, 1.5, 0.6, 0.5]))


def test_what_was_found_for_all_features_goes_with_them(toys):
    recipe = replace(toys.recipe(), info={"calibration": {}, "weighed": {}, "ranking": "x", "scores": [5, 4, 3, 2, 1]})
    assert chosen(recipe, "middle", {1: Wish(name="a")}).info == recipe.info | {"named": {"1": {"name": "a"}}}
    assert chosen(recipe, "middle", {1: Wish(on=False)}).info == {"ranking": "x", "scores": [5, 3, 2, 1]}
    assert "calibration" not in chosen(recipe, "middle", {1: Wish(weight=0.5)}).info


def test_where_nothing_is_ticked_nothing_is_changed(toys):
    recipe, h = toys.recipe(), toys.activations().values[1]
    found = chosen(recipe, "middle", {}, on=False)
    assert len(found.features) == 5 and not edit(found, h).any()
    assert chosen(recipe, "middle", {3: Wish(on=True)}, on=False).features.tolist() == [3]


def test_names_groups_and_weights_are_saved_and_loaded(toys, tmp_path):
    wishes = {0: Wish(on=False), 1: Wish(name="<img src=x>", group="hair", weight=0.25), 2: Wish(group="hair")}
    found = as_stored(chosen(toys.recipe(), "middle", wishes))
    save_recipe(tmp_path / "a.safetensors", found)
    loaded = load_recipe(tmp_path / "a.safetensors")
    assert loaded.info == found.info
    assert loaded.info["named"] == {"1": {"name": "<img src=x>", "group": "hair"}, "2": {"group": "hair"}}
    for name in ("features", "weight", "decoder", "encoder", "member"):
        torch.testing.assert_close(getattr(loaded, name), getattr(found, name))
    again = chosen(loaded, "middle", {1: Wish(name="", group="skin"), 2: Wish(on=False)})
    assert again.info["named"] == {"1": {"group": "skin"}}


def test_of_several_sites_one_is_chosen_from(toys):
    other = replace(toys.recipe(seed=7), site="later", strength=(1.0, 0.5, 2.0))
    recipe = joined(toys.recipe(), other)
    for site, counts in (("middle", [4, 5]), ("later", [5, 4])):
        found = chosen(recipe, site, {2: Wish(on=False)})
        assert found.sites == ("middle", "later") and [len(part.features) for part in found.parts] == counts
