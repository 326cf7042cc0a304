"""What does not fit ends with one clear sentence that names the node: files, settings, and inputs of one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expected import shipped
from small_graphs import AVATARS, Avatars, diagnose, foreign_sae, refusal

from difflens_core.networks import load_denoiser, save_denoiser
from difflens_core.steer import save_recipe


@pytest.fixture(scope="module")
def bad_files(server):
    """Files that do not fit, in the user's folders."""
    models, recipes = (server.base / "models" / f"difflens_{kind}" for kind in ("models", "recipes"))
    models.mkdir(parents=True, exist_ok=True)
    recipes.mkdir(parents=True, exist_ok=True)
    whole = AVATARS / "difflens_recipes" / "avatars_age.safetensors"
    (recipes / "cut_off.safetensors").write_bytes(whole.read_bytes()[:100_000])
    (recipes / "an_sae.safetensors").write_bytes((AVATARS / "difflens_saes" / "avatars.safetensors").read_bytes())
    recipe = shipped("age")
    save_recipe(recipes / "no_site.safetensors", replace(recipe, site="attic"))
    save_recipe(recipes / "height.safetensors", replace(recipe, attribute="height"))
    save_recipe(recipes / "inner_site.safetensors", replace(recipe, site="middle_block.0.qkv"))
    save_recipe(recipes / "flat_site.safetensors", replace(recipe, site="embed.0"))
    narrow = {name: getattr(recipe, name)[..., :100] for name in ("encoder", "decoder", "probe_weight")}
    normalisation = replace(recipe.normalisation, mean=recipe.normalisation.mean[:, :100])
    narrow["levels"] = replace(recipe.levels, weight=recipe.levels.weight[..., :100])
    save_recipe(recipes / "narrow.safetensors", replace(recipe, normalisation=normalisation, **narrow))
    foreign_sae(server, "nameless")
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    model.position.data *= 1.1
    save_denoiser(models / "other.safetensors", model, {})
    model.position.data[0, 0] = torch.nan
    save_denoiser(models / "nan.safetensors", model, {})


# Each adds to a graph what does not fit.
Spoil = Callable[[Avatars], object]


def recipe(name: str) -> Spoil:
    return lambda graph: graph.save(graph.draw_steered(name))


def steering(**settings: object) -> Spoil:
    return lambda graph: graph.save(graph.draw_steered(**settings))


def capture(**settings: object) -> Spoil:
    return lambda graph: graph.add("PreviewImage", images=graph.capture(**settings)[1])


def report(**settings: str) -> Spoil:
    return lambda graph: graph.report(graph.pictures(graph.draw()), **settings)


def drawing(graph: Avatars) -> None:
    graph.save(graph.draw())


def unequal_report(graph: Avatars) -> None:
    before = graph.pictures(graph.draw())
    graph.report(before, graph.add("ImageFromBatch", image=before[0], batch_index=0, length=1))


def nameless_sae(graph: Avatars) -> None:
    graph.show(graph.add("DiffLensLoadSAE", sae_name="nameless", site="")[1])


def one_picture(graph: Avatars) -> None:
    graph.show(graph.train(graph.capture(pictures=1), 10)[2])


def another_model(graph: Avatars) -> None:
    captured = graph.capture(pictures=64, steps=6)
    avatars = graph.add("DiffLensLoadModel", model_name="avatars.safetensors")
    graph.show(graph.attribute(captured, graph.sae(), avatars[0])[2])


def diagnosis(attribute: str, **settings: object) -> Spoil:
    def spoil(graph: Avatars) -> None:
        captured = graph.capture(pictures=8, **settings)
        labels = {"activations": captured[0], "labels": graph.labels(captured, attribute)}
        graph.show(diagnose(graph, "avatars_presentation", **labels)[0])

    return spoil


def saving(name: str) -> Spoil:
    return lambda graph: graph.add("DiffLensSaveRecipe", recipe=graph.recipe(), name=name)


BAD = {
    "a file cut off": (recipe("cut_off"), ("Load Recipe: cut_off.safetensors", "copy or download it again")),
    "a file of another kind": (recipe("an_sae"), ("Load Recipe: an_sae.safetensors", "expected a DiffLens recipe")),
    "no such site": (recipe("no_site"), ("Steer: ", "no module attic")),
    "another width": (recipe("narrow"), ("Steer: ", "100", "256")),
    "another width inside": (recipe("inner_site"), ("Steer: ", "768", "256")),
    "no map at the site": (recipe("flat_site"), ("Steer: ", "2 dimensions", "batch x channels")),
    "an unknown class": (steering(target="old"), ("Steer: ", '"old" is not understood', "young, adult, senior")),
    "an empty span": (steering(start_percent=0.8, end_percent=0.2), ("Steer: ", "0.8", "0.2")),
    "another picture size": (drawing, ("64 x 64", "128")),
    "NaN in the weights": (drawing, ("Load Unconditional Model: nan.safetensors", "NaN")),
    "a capture of no step": (
        capture(start_percent=0.7, end_percent=0.9),
        ("Capture Activations: ", "no step lies between 0.7 and 0.9"),
    ),
    "a capture of one site twice": (
        capture(site="middle_block, middle_block"),
        ("Capture Activations: ", "each only once"),
    ),
    "an unknown attribute": (report(attribute="height"), ("Fairness Report: ", "'height'", "presentation, age")),
    "an unknown target": (report(target="1, 2"), ("Fairness Report: ", '"1, 2" is not understood')),
    "unequal batches": (unequal_report, ("Fairness Report: ", "2 pictures", "1 pictures")),
    "an SAE of an unknown site": (nameless_sae, ("Load SAE: nameless does not say", "into site", "8 latents")),
    "a capture without site": (capture(site="cellar"), ("Capture Activations: ", "no module cellar")),
    "activations of another model": (another_model, ("Attribute Features: ", "captured on another model")),
    "a diagnosis of an unknown attribute": (
        lambda graph: graph.show(diagnose(graph, "height")[0]),
        ("Diagnose: ", "knows no attribute 'height'", "presentation, age"),
    ),
    "labels of another attribute": (
        diagnosis("age"),
        ("Diagnose: ", "the labels are of age (young, adult, senior)", "the recipe is for presentation"),
    ),
    "activations of another site": (
        diagnosis("presentation", site="up"),
        ("Diagnose: ", "the activations are of up", "edits middle_block", "Capture at the recipe's site"),
    ),
    "too little to train on": (one_picture, ("Train SAE: ", "got one picture, expected at least 2")),
    "a way out of the folder": (saving("../../escaped"), ("Save Recipe: ", "cannot be a file name")),
}  # fmt: skip
GIVEN = {
    "another picture size": {"size": 128},
    "NaN in the weights": {"model": "nan"},
    "activations of another model": {"model": "other", "pictures": 32},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_sentence(server, bad_files, case):
    spoil, phrases = BAD[case]
    graph = Avatars(**GIVEN.get(case, {}))
    spoil(graph)
    message = refusal(server, graph)
    assert all(phrase in message for phrase in phrases), message
    assert "difflens_core" not in message, "the page shows where the pack lies on the disk"
