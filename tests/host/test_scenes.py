"""People in scenes in a real ComfyUI: one recipe at sizes it was not made on."""

from __future__ import annotations

import shutil

import pytest
import torch
from graphs import FOLDER, Node, steer, to_api
from small_graphs import latents
from test_prompted import CFG, SEED, STEPS, Prompts

from difflens_core.networks import Guidance, load_prompted, sample, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets

FILES = FOLDER.parent / "models" / "scenes"
PICTURES = 2
PROMPT = "a doctor, medium, middle"


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


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
def test_at_sizes_that_the_recipe_was_not_made_on_stock_nodes_draw_what_the_core_draws(server, width, height):
    shutil.copytree(FILES, server.base / "models", dirs_exist_ok=True)  # they are not in the registry's archive
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
