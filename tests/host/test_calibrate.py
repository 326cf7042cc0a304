"""Calibrate, Plan Targets and Cross Effects in a real ComfyUI: against the core, cut off, and with bad input."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import FOLDER, Graph, Link, Node, load_classifier, load_model, sampler, steer, to_api
from host import HostError, Server
from safetensors.torch import load_file

from difflens_core.classifiers import load_classifier as read_classifier
from difflens_core.experiments import CalibrationOptions, calibrate
from difflens_core.networks import drawer, load_denoiser, start_noise
from difflens_core.steer import load_recipe, plan_moves, save_recipe

AVATARS = FOLDER.parent / "models" / "avatars"
STEPS, SEED, BUDGET = 4, 5, 100
CALIBRATE = {
    "target": "uniform", "budget": BUDGET, "tolerance": 0.02, "clear": 0.9, "only_where_needed": True, "steps": STEPS,
    "sampler_name": "euler", "scheduler": "simple", "seed": SEED, "cfg": 1.0,
}  # fmt: skip


class Avatars(Graph):
    """The avatars, their classifier, recipes, and pictures of four steps."""

    def __init__(self, batch: int = 8):
        super().__init__("avatars")
        self.group("all")
        self.model, self.classifier = load_model(self), load_classifier(self)
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=batch)

    def recipe(self, attribute: str = "presentation") -> Link:
        return self.add("DiffLensLoadRecipe", recipe_name=f"avatars_{attribute}.safetensors")[0]

    def experiment(self, type: str, **settings: object) -> Node:
        return self.add(
            type, model=self.model[0], positive=self.model[1], latent_image=self.latent[0], vae=self.model[2],
            classifier=self.classifier[0], **settings,
        )  # fmt: skip

    def draw(self, model: Link | None = None) -> Node:
        drawn = sampler(self, None, model or self.model[0], self.model[1], self.latent, 3)
        drawn.inputs["steps"] = STEPS
        return drawn

    def plan(self, before: Node, *recipes: Link, target: str = "uniform") -> Node:
        sockets = {f"recipes.recipe{i}": recipe for i, recipe in enumerate(recipes)}
        images = self.add("VAEDecode", samples=before[0], vae=self.model[2])
        return self.add(
            "DiffLensPlan", classifier=self.classifier[0], before=images[0], target=target, seed=0, **sockets
        )

    def save(self, drawn: Node) -> Node:
        return self.add("SaveLatent", samples=drawn[0], filename_prefix="latents/planned")

    def show(self, source: Link) -> Node:
        return self.add("PreviewAny", source=source)


def text_of(entry: dict, node: Node) -> str:
    return entry["outputs"][str(node.id)]["text"][0]


def saved(server: Server, entry: dict, node: Node) -> torch.Tensor:
    (found,) = entry["outputs"][str(node.id)]["latents"]
    return load_file(server.base / "output" / found["subfolder"] / found["filename"])["latent_tensor"]


def test_calibrate_finds_what_the_core_finds_and_goes_on_after_cancel(server):
    graph = Avatars()
    node = graph.experiment("DiffLensCalibrate", recipe=graph.recipe(), **CALIBRATE)
    graph.add("DiffLensSaveRecipe", recipe=node[0], name="calibrated")
    shown = graph.show(node[3])

    begun, seen = threading.Event(), []

    def watch(nodes: dict) -> None:
        state = nodes.get(str(node.id))
        if state and state["state"] == "running" and 16 <= state["value"] < state["max"]:
            begun.set()

    prompt_id = server.queue(to_api(graph))
    canceller = threading.Thread(target=lambda: begun.wait(120) and server.interrupt(prompt_id))
    canceller.start()
    with pytest.raises(HostError, match="interrupted in DiffLensCalibrate"):
        server.wait(prompt_id, timeout=180, on_progress=watch)
    canceller.join()
    assert len([*(server.base / "temp").glob("difflens_calibration_*")]) == 1

    def first(nodes: dict) -> None:
        state = nodes.get(str(node.id))
        if state and state["value"]:
            seen.append(state["value"])

    entry = server.run(to_api(graph), on_progress=first)
    assert min(seen) > 8, "what was drawn before Cancel was drawn again"
    assert not [*(server.base / "temp").glob("difflens_calibration_*")]

    record = json.loads(text_of(entry, shown))
    recipe = load_recipe(AVATARS / "difflens_recipes" / "avatars_presentation.safetensors")
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    classifier = read_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    expected = calibrate(
        recipe, drawer(model, start_noise(2 * (BUDGET // 5), SEED), STEPS),
        lambda pictures: classifier.classify(pictures)["presentation"], np.full(2, 0.5),
        CalibrationOptions(BUDGET, clear=0.9, only_where_needed=True, seed=SEED), 8,
    )  # fmt: skip
    assert record["drawn"] == expected.info["calibration"]["drawn"] <= BUDGET
    assert record["start"]["fd"] == pytest.approx(expected.info["calibration"]["start"]["fd"], abs=2e-3)
    assert record["fresh"]["fd"] == pytest.approx(expected.info["calibration"]["fresh"]["fd"], abs=0.02)
    kept = load_recipe(server.base / "models" / "difflens_recipes" / "calibrated.safetensors")
    assert kept.strength == pytest.approx(expected.strength, rel=1e-3) and kept.info["calibration"] == record


def test_steer_asks_for_the_shares_that_were_calibrated(server):
    folder = server.base / "models" / "difflens_recipes"
    recipe = load_recipe(AVATARS / "difflens_recipes" / "avatars_presentation.safetensors")
    record = {"target": [0.5, 0.5], "ask": [0.25, 0.75], "only_where_needed": False}
    save_recipe(folder / "asks_more.safetensors", replace(recipe, info={"calibration": record}))
    graph = Avatars()
    loaded = graph.add("DiffLensLoadRecipe", recipe_name="asks_more.safetensors")
    images = [graph.add("VAEDecode", samples=graph.draw()[0], vae=graph.model[2])]
    node = steer(graph, None, graph.model[0], loaded[0])
    images.append(graph.add("VAEDecode", samples=graph.draw(node[0])[0], vae=graph.model[2]))
    report = graph.add(
        "DiffLensReport", classifier=graph.classifier[0], attribute="presentation", target="uniform",
        before=images[0][0], after=images[1][0], targets=node[1],
    )  # fmt: skip
    shown = graph.show(report[1])
    after = json.loads(text_of(server.run(to_api(graph)), shown))["after"]
    assert after["success"] >= 0.75 and after["shares"][1] >= 0.6


def test_a_plan_for_two_attributes_is_met_and_leaves_the_rest_alone(server):
    graph = Avatars(batch=12)
    before, recipes = graph.draw(), [graph.recipe("presentation"), graph.recipe("age")]
    plan = graph.plan(before, *recipes, target="uniform\nyoung: 1, adult: 1")
    steered = graph.model[0]
    for recipe in recipes:
        node = steer(graph, None, steered, recipe, strength=1.3)
        node.inputs["targets"] = plan[0]
        steered = node[0]
    after = graph.draw(steered)
    kept, words = [graph.save(before), graph.save(after)], graph.show(plan[1])
    entry = server.run(to_api(graph))
    pictures = [saved(server, entry, node).movedim(1, -1) / 2 + 0.5 for node in kept]
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
    graph = Avatars()
    sockets = {"recipes.recipe0": graph.recipe("presentation"), "recipes.recipe1": graph.recipe("age")}
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


def uncalibrated(**settings: object):
    def make(graph: Avatars) -> Link:
        return graph.experiment("DiffLensCalibrate", recipe=graph.recipe(), **{**CALIBRATE, **settings})[2]

    return make


def short_plan(graph: Avatars) -> Link:
    recipe = graph.recipe()
    plan = graph.plan(graph.draw(), recipe)
    graph.latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=9)
    node = steer(graph, None, graph.model[0], recipe)
    node.inputs["targets"] = plan[0]
    return graph.draw(node[0])[0]


def foreign_plan(graph: Avatars) -> Link:
    node = steer(graph, None, graph.model[0], graph.recipe("age"))
    node.inputs["targets"] = graph.plan(graph.draw(), graph.recipe())[0]
    return graph.draw(node[0])[0]


BAD = {
    "one class": (uncalibrated(target="feminine"), ("Calibrate: ", "one class only")),
    "an unknown class": (uncalibrated(target="old"), ("Calibrate: ", '"old" is not understood')),
    "no negative": (uncalibrated(cfg=2.0), ("Calibrate: ", "none is connected")),
    "a plan for fewer pictures": (short_plan, ("Steer: ", "holds 8 pictures, the run has 9")),
    "a plan of another attribute": (foreign_plan, ("Steer: ", "those of age (young, adult, senior) are needed")),
    "two recipes of an attribute": (
        lambda graph: graph.plan(graph.draw(), graph.recipe(), graph.recipe())[1],
        ("Plan Targets: ", "two recipes are about presentation"),
    ),
    "too many lines": (
        lambda graph: graph.plan(graph.draw(), graph.recipe(), target="uniform\nuniform")[1],
        ("Plan Targets: ", "target has 2 lines for 1 recipes"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_sentence(server, case):
    make, phrases = BAD[case]
    graph = Avatars()
    graph.show(make(graph))
    with pytest.raises(HostError) as caught:
        server.run(to_api(graph))
    message = str(caught.value)
    assert "DiffLensError: " in message and all(phrase in message for phrase in phrases), message
    assert "\n" not in message and "Traceback" not in message
