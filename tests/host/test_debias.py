"""Debias is Steer with the mix by name: the same pictures, and words where something is amiss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import to_api
from small_graphs import Avatars, latents, refusal

RECIPE = "avatars_age.safetensors"


def debias(graph: Avatars, mix: dict, **settings: object):
    """Debias with a recipe's options as the page sends them."""
    inputs = {"recipe": RECIPE, **{f"recipe.{name}": value for name, value in mix.items()}, "strength": 1.0}
    return graph.add("DiffLensDebias", model=graph.model[0], **inputs | settings)


MIXES = {
    "even mix": ({"mix": "even mix"}, "uniform", 1.0),
    "gentle": ({"mix": "gentle"}, "uniform", 0.5),
    "one class": ({"mix": "only senior"}, "senior", 1.0),
    "as it was": ({"mix": "as it was"}, "uniform", 0.0),
    "own shares": (
        {"mix": "own shares", "mix.young %": 60, "mix.adult %": 0, "mix.senior %": 20},
        "young: 3, senior: 1",
        1.0,
    ),
}


@pytest.mark.parametrize("mix", MIXES)
def test_it_draws_what_steer_draws(server, mix):
    chosen, target, strength = MIXES[mix]
    graph = Avatars(pictures=4)
    one = graph.save(graph.draw(debias(graph, chosen)[0]))
    other = graph.save(graph.draw(graph.steer(graph.recipe("avatars_age"), target=target, strength=strength, run=0)[0]))
    entry = server.run(to_api(graph))
    found, expected = (latents(server, entry, node) for node in (one, other))
    assert torch.equal(found, expected)


def test_the_page_is_told_the_classes_of_every_recipe(object_info):
    (recipe, settings) = object_info["DiffLensDebias"]["input"]["required"]["recipe"]
    options = {option["key"]: option["inputs"]["required"]["mix"][1]["options"] for option in settings["options"]}
    assert recipe == "COMFY_DYNAMICCOMBO_V3" and {RECIPE, "avatars_skin_tone.safetensors"} <= options.keys()
    assert not any("controls" in name for name in options), "controls steer by random features"
    names = [option["key"] for option in options[RECIPE]]
    assert names == ["even mix", "gentle", "only young", "only adult", "only senior", "as it was", "own shares"]
    sliders = options[RECIPE][-1]["inputs"]["required"]
    assert [*sliders] == ["young %", "adult %", "senior %"]


NO_SHARE = {"mix": "own shares", "mix.young %": 0, "mix.adult %": 0, "mix.senior %": 0}
AMISS = {
    "no share": (NO_SHARE, {}, "Debias: all shares are 0, so no picture could be drawn."),
    "a recipe that is not here": (MIXES["even mix"][0], {"recipe": "gone.safetensors"}, "Debias: gone.safetensors was"),
}


@pytest.mark.parametrize("case", AMISS)
def test_what_is_amiss_is_said(server, case):
    mix, settings, told = AMISS[case]
    graph = Avatars(pictures=1)
    graph.save(graph.draw(debias(graph, mix, **settings)[0]))
    assert told in refusal(server, graph)


def test_a_recipe_of_another_model_is_said_with_those_that_fit(inside):
    host, steer = inside.host, inside.pack_module("nodes.steer")
    model = host.load_unconditional(host.find_model("avatars.safetensors"))
    recipe = inside.pack_module("difflens_core.steer").load_recipe(host.find_file(host.RECIPES, RECIPE))
    assert steer.check_model(model, recipe) == []
    (told,) = steer.check_model(model, replace(recipe, model="other"))
    assert "made on other weights" in told and "Made on this model are: avatars_age.safetensors, avatars_pres" in told
    assert "prompted" not in told
