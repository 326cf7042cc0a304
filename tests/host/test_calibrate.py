"""Calibrate, Plan Targets and Cross Effects in a real ComfyUI: against the core, cut off, and with bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from expected import shipped
from graphs import Link, Node, to_api
from small_graphs import AVATARS, Avatars, cancel_in, latents, refusal, text_of

from difflens_core.activations import Drawer
from difflens_core.classifiers import load_classifier as read_classifier
from difflens_core.experiments import CalibrationOptions, calibrate
from difflens_core.networks import DenoiserSampler, load_denoiser, start_noise
from difflens_core.steer import load_recipe, plan_moves, weigh_latents

STEPS, SEED, BUDGET = 4, 5, 100
CALIBRATE = {
    "target": "uniform", "budget": BUDGET, "tolerance": 0.02, "clear": 0.9, "only_where_needed": True, "steps": STEPS,
    "sampler_name": "euler", "scheduler": "simple", "seed": SEED, "cfg": 1.0,
}  # fmt: skip


def plan(graph: Avatars, before: Node, *recipes: Link, target: str = "uniform") -> Node:
    sockets = {f"recipes.recipe{i}": recipe for i, recipe in enumerate(recipes)}
    images = graph.pictures(before)[0]
    return graph.add("DiffLensPlan", classifier=graph.classifier[0], before=images, target=target, seed=0, **sockets)


def test_calibrate_finds_what_the_core_finds_and_goes_on_after_cancel(server):
    graph = Avatars(pictures=8)
    node = graph.experiment("DiffLensCalibrate", recipe=graph.recipe("avatars_presentation"), **CALIBRATE)
    graph.add("DiffLensSaveRecipe", recipe=node[0], name="calibrated")
    shown = graph.show(node[3])

    weighing = 2 * (BUDGET // 5)  # pictures before the calibration begins
    cancel_in(server, graph, node, after=weighing + 16)
    assert len([*(server.base / "temp").glob("difflens_calibration_*")]) == 1

    seen = []

    def first(nodes: dict) -> None:
        state = nodes.get(str(node.id))
        if state and state["value"]:
            seen.append(state["value"])

    entry = server.run(to_api(graph), on_progress=first)
    assert min(done for done in seen if done > weighing) > weighing + 8, "what was drawn before Cancel was drawn again"
    assert not [*(server.base / "temp").glob("difflens_calibration_*")]

    record = json.loads(text_of(entry, shown))
    recipe = shipped("presentation")
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    classifier = read_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    sampler, noise = DenoiserSampler(model, STEPS), start_noise(2 * (BUDGET // 5), SEED)
    weighed = weigh_latents(recipe, sampler, classifier, noise[: BUDGET // 5], 8)
    expected = calibrate(
        weighed, Drawer(sampler, noise),
        lambda pictures: classifier.classify(pictures)["presentation"], np.full(2, 0.5),
        CalibrationOptions(BUDGET, clear=0.9, only_where_needed=True, seed=SEED), 8,
    )  # fmt: skip
    assert record["drawn"] == expected.info["calibration"]["drawn"] <= BUDGET
    assert record["start"]["fd"] == pytest.approx(expected.info["calibration"]["start"]["fd"], abs=2e-3)
    assert record["fresh"]["fd"] == pytest.approx(expected.info["calibration"]["fresh"]["fd"], abs=0.02)
    kept = load_recipe(server.base / "models" / "difflens_recipes" / "calibrated.safetensors")
    torch.testing.assert_close(kept.weight, weighed.weight, rtol=0.02, atol=0.02)
    left = kept.info["weighed"]
    assert left["spared"] == weighed.info["weighed"]["spared"]
    assert kept.strength == pytest.approx(expected.strength, rel=1e-3) and kept.info["calibration"] == record


def test_features_can_be_left_as_they_are(server):
    graph = Avatars(pictures=8)
    settings = {**CALIBRATE, "spare_others": False}
    node = graph.experiment("DiffLensCalibrate", recipe=graph.recipe(PRESENTATION), **settings)
    graph.add("DiffLensSaveRecipe", recipe=node[0], name="as it was")
    shown = graph.show(node[2])
    assert "weighed" not in text_of(server.run(to_api(graph)), shown)
    kept = load_recipe(server.base / "models" / "difflens_recipes" / "as it was.safetensors")
    given = shipped("presentation").weight
    assert kept.weight is given is None or torch.equal(kept.weight, given)


def test_a_plan_for_two_attributes_is_met_and_leaves_the_rest_alone(server):
    graph = Avatars(pictures=12)
    before, recipes = graph.draw(), [graph.recipe("avatars_presentation"), graph.recipe("avatars_age")]
    planned = plan(graph, before, *recipes, target="uniform\nyoung: 1, adult: 1")
    steered = graph.model[0]
    for recipe in recipes:
        steered = graph.steer(recipe, steered, strength=1.3, targets=planned[0])[0]
    after = graph.draw(steered)
    kept, words = [graph.save(before), graph.save(after)], graph.show(planned[1])
    entry = server.run(to_api(graph))
    pictures = [latents(server, entry, node).movedim(1, -1) / 2 + 0.5 for node in kept]
    classifier = read_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    reads = [classifier.classify(images.clamp(0, 1)) for images in pictures]
    own, shown = (
        np.stack([read[name].argmax(dim=1).numpy() for name in ("presentation", "age")], axis=1) for read in reads
    )
    asked = plan_moves(own, np.multiply.outer(np.full(2, 0.5), np.array([0.5, 0.5, 0])), 0)
    moved = (asked != own).any(axis=1)
    assert 0 < moved.sum() < 12
    assert torch.equal(pictures[0][~moved], pictures[1][~moved])
    assert all(not torch.equal(pictures[0][i], pictures[1][i]) for i in np.flatnonzero(moved))
    assert (shown == asked).all(axis=1).mean() >= 0.75
    assert text_of(entry, words).startswith(f"{moved.sum()} of 12 pictures change")


def test_cross_effects_see_every_attribute(server):
    graph = Avatars(pictures=8)
    sockets = {f"recipes.recipe{i}": graph.recipe(f"avatars_{name}") for i, name in enumerate(("presentation", "age"))}
    settings = {name: CALIBRATE[name] for name in ("steps", "sampler_name", "scheduler", "seed", "cfg")}
    node = graph.experiment("DiffLensCrossEffects", pictures=16, **sockets, **settings)
    words, numbers = graph.show(node[0]), graph.show(node[1])
    entry = server.run(to_api(graph))
    rows = json.loads(text_of(entry, numbers))
    assert {row["steered"] for row in rows} == {"presentation", "age", "all together"}
    assert {row["watched"] for row in rows} >= {"presentation", "age", "skin_tone", "background", "clothes"}
    hits = [row["share"] for row in rows if row["asked"]]
    assert len(hits) == 4 and min(hits) >= 0.5
    assert len(text_of(entry, words).splitlines()) == 2 + 3


PRESENTATION = "avatars_presentation"


def uncalibrated(**settings: object):
    def make(graph: Avatars) -> Link:
        return graph.experiment("DiffLensCalibrate", recipe=graph.recipe(PRESENTATION), **{**CALIBRATE, **settings})[2]

    return make


def two_plans(target: str, *names: str):
    return lambda graph: plan(graph, graph.draw(), *map(graph.recipe, names), target=target)[1]


def short_plan(graph: Avatars) -> Link:
    recipe = graph.recipe(PRESENTATION)
    planned = plan(graph, graph.draw(), recipe)
    graph.latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=9)
    return graph.draw(graph.steer(recipe, targets=planned[0])[0])[0]


def foreign_plan(graph: Avatars) -> Link:
    planned = plan(graph, graph.draw(), graph.recipe(PRESENTATION))
    return graph.draw(graph.steer(graph.recipe("avatars_age"), targets=planned[0])[0])[0]


BAD = {
    "one class": (uncalibrated(target="feminine"), ("Calibrate: ", "one class only")),
    "an unknown class": (uncalibrated(target="old"), ("Calibrate: ", '"old" is not understood')),
    "no negative": (uncalibrated(cfg=2.0), ("Calibrate: ", "none is connected")),
    "a plan for fewer pictures": (short_plan, ("Steer: ", "holds 8 pictures, the run has 9")),
    "a plan of another attribute": (foreign_plan, ("Steer: ", "those of age (young, adult, senior) are needed")),
    "two recipes of an attribute": (
        two_plans("uniform", PRESENTATION, PRESENTATION),
        ("Plan Targets: ", "two recipes are about presentation"),
    ),
    "too many lines": (
        two_plans("uniform\nuniform", PRESENTATION),
        ("Plan Targets: ", "target has 2 lines for 1 recipes"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_sentence(server, case):
    make, phrases = BAD[case]
    graph = Avatars(pictures=8)
    graph.show(make(graph))
    message = refusal(server, graph)
    assert all(phrase in message for phrase in phrases), message
