"""People in scenes in a real ComfyUI: one recipe at sizes it was not made on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from graphs import FOLDER, Node, any_size, sampler, steer, to_api, to_ui
from small_graphs import OF_SCENES, api_file, find, latents
from test_prompted import CFG, SEED, STEPS, Prompts

from difflens_core.classifiers import load_classifier
from difflens_core.networks import Guidance, load_prompted, sample, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets

FILES = FOLDER.parent / "models" / "scenes"
PICTURES = 2
PROMPT = "a doctor, medium, middle"


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """They are not in the registry's archive."""
    shutil.copytree(FILES, server.base / "models", dirs_exist_ok=True, ignore=shutil.ignore_patterns(".work"))


class Scenes(Prompts):
    """Pictures of that size, with and without one recipe for presentation."""

    def __init__(self, width: int, height: int):
        super().__init__(PICTURES)
        self.model.inputs["model_name"] = "scenes.safetensors"
        self.latent.inputs |= {"width": width, "height": height}
        recipe = self.add("DiffLensLoadRecipe", recipe_name="scenes_presentation.safetensors")
        self.steered = steer(self, None, self.model[0], recipe[0], "feminine")

    def both(self) -> list[Node]:
        """Drawn by the plain and by the steered model."""
        return [self.draw(PROMPT, model=model) for model in (self.model, self.steered)]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 96)])
def test_at_sizes_that_the_recipe_was_not_made_on_stock_nodes_draw_what_the_core_draws(server, width, height):
    graph = Scenes(width, height)
    saved = graph.both()
    entry = server.run(to_api(graph))
    recipe = load_recipe(FILES / "difflens_recipes" / "scenes_presentation.safetensors")
    model, text = load_prompted(FILES / "difflens_models" / "scenes.safetensors")
    asked = Targets(recipe.attribute, recipe.classes, (0.0, 1.0))
    guidance = Guidance(text.encode([PROMPT]), text.encode([""]), CFG)
    for node, edits in zip(saved, ([], [Steering(recipe, asked.of)]), strict=True):
        expected = sample(model, start_noise(PICTURES, SEED, height, width), STEPS, edits, guidance=guidance)
        torch.testing.assert_close(latents(server, entry, node).clamp(-1, 1), expected, atol=1e-2, rtol=0)


def test_a_second_pass_at_another_size_turns_with_the_same_recipe(server):
    """Hires fix: drawn small, made larger, drawn on at the new size; the recipe was made on neither size."""
    graph = Scenes(64, 64)
    graph.latent.inputs["batch_size"] = 8
    saved = []
    for model in (graph.model, graph.steered):
        first = sampler(graph, None, model[0], graph.text(PROMPT)[0], graph.latent, SEED, graph.text("")[0], CFG)
        larger = graph.add("LatentUpscaleBy", samples=first[0], upscale_method="bilinear", scale_by=1.5)
        second = sampler(graph, None, model[0], graph.text(PROMPT)[0], larger, SEED, graph.text("")[0], CFG)
        first.inputs["steps"], second.inputs["steps"], second.inputs["denoise"] = 10, 10, 0.6
        saved.append(graph.add("SaveLatent", samples=second[0], filename_prefix="latents/hires"))
    entry = server.run(to_api(graph))
    classifier = load_classifier(FILES / "difflens_classifiers" / "scenes.safetensors")
    shown = []
    for node in saved:
        drawn = latents(server, entry, node).clamp(-1, 1)
        assert drawn.shape == (8, 3, 96, 96)
        shown.append(classifier.classify(drawn.movedim(1, -1) / 2 + 0.5))
    plain, steered = (float(of["presentation"].argmax(1).float().mean()) for of in shown)
    assert plain <= 0.25 and steered >= 0.75, (plain, steered)
    kept = (shown[0]["background"].argmax(1) == shown[1]["background"].argmax(1)).float().mean()
    assert kept >= 0.75


def test_prompts_for_areas_are_steered_by_it(server):
    graph = Scenes(128, 96)
    saved = []
    for model in (graph.model, graph.steered):
        # Areas are told in units of 8 to a latent's pixel, and a pixel of this model's latents is one of the picture.
        area = graph.add(
            "ConditioningSetArea", conditioning=graph.text("a nurse, close, left")[0], width=512, height=768, x=512,
            y=0, strength=1.0,
        )  # fmt: skip
        both = graph.add(
            "ConditioningCombine", conditioning_1=graph.text("a doctor, close, left")[0], conditioning_2=area[0]
        )
        drawn = sampler(graph, None, model[0], both[0], graph.latent, SEED, graph.text("")[0], CFG)
        drawn.inputs["steps"] = STEPS
        saved.append(graph.add("SaveLatent", samples=drawn[0], filename_prefix="latents/areas"))
    entry = server.run(to_api(graph))
    plain, steered = (latents(server, entry, node) for node in saved)
    change = (steered - plain).abs().mean(dim=1)
    assert torch.isfinite(steered).all() and change[:, :, :64].mean() > 0.01 and change[:, :, 64:].mean() > 0.01


def test_the_workflow_is_what_its_description_makes_and_turns_pictures_of_three_sizes(server):
    graph, prompt = any_size(), api_file(OF_SCENES)
    written = json.loads((FOLDER / f"{OF_SCENES}.json").read_text(encoding="utf-8"))
    assert written == to_ui(graph, server.object_info()) and prompt == to_api(graph)
    for node in prompt.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = 8
    entry = server.run(prompt, timeout=600)
    for shape in ("square", "tall", "wide"):
        (told,) = entry["outputs"][find(prompt, "DiffLensReport", save_as=f"difflens/report {shape}")]["json"]
        found = json.loads(told)
        before, after = found["before"]["fd"], found["after"]["fd"]
        assert found["n"] == 8 and before > 0.3 and after < 0.6 * before  # one picture of eight is .09
        assert found["kept"]["occupation"] >= 0.8 and found["kept"]["background"] >= 0.8
