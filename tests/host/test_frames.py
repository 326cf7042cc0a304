"""Pictures whose subjects are anywhere, in a real ComfyUI: a classifier finds them, and the recipe follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from graphs import to_api
from host import Server
from small_graphs import AVATARS, Avatars, latents, text_of

from difflens_core.activations import GRID
from difflens_core.classifiers import FramedClassifier, load_classifier, save_classifier
from difflens_core.networks import load_denoiser, sample, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets


def finding(path: Path) -> None:
    """The avatars' classifier behind a finder that puts its frame here or there, as the picture's pixels fall."""
    own = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    whole = {"background": own.attributes["background"]}
    torch.manual_seed(2)
    model = FramedClassifier({n: of for n, of in own.attributes.items() if n not in whole}, whole).eval()
    weights = own.state_dict()
    for part in (model.figure, model.whole):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    features = own.features.state_dict()
    model.finder.features.load_state_dict(features)
    head = model.finder.heads["frame"]
    head.weight.data = 0.02 * torch.randn(head.weight.shape)
    head.bias.data = torch.tensor([0.5, 0.5, 0.8])
    save_classifier(path, model, {})


def test_a_recipe_of_pictures_that_are_not_aligned_follows_the_subject(server: Server):
    folder = server.base / "models" / "difflens_classifiers"
    folder.mkdir(parents=True, exist_ok=True)
    finding(folder / "finding.safetensors")
    graph = Avatars(4)
    graph.classifier.inputs["classifier_name"] = "finding.safetensors"
    captured = graph.capture(pictures=48, steps=4)
    made = graph.attribute(captured, graph.sae())
    graph.add("DiffLensSaveRecipe", recipe=made[0], name="framed")
    plain, steered = graph.draw(), graph.draw(graph.steer(made[0], target="feminine", hold="off")[0])
    saved = [graph.save(drawn) for drawn in (plain, steered)]
    entry = server.run(to_api(graph), timeout=600)
    assert "finds the subject of each picture" in text_of(entry, made)
    recipe = load_recipe(server.base / "models" / "difflens_recipes" / "framed.safetensors")
    assert recipe.frame is not None and recipe.map == (GRID, GRID)
    before, after = (latents(server, entry, node) for node in saved)
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    asked = Targets(recipe.attribute, recipe.classes, (0.0, 1.0)).of
    expected = sample(model, start_noise(4, 3), 4, [Steering(replace(recipe, hold=False), asked)])
    torch.testing.assert_close(after.clamp(-1, 1), expected, atol=2e-2, rtol=0)
    assert not torch.allclose(before, after, atol=0.1)
