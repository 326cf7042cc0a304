"""The avatars at work: prompts that fit the drawings, a site that carries the picture, recipes that steer by prompt."""

from __future__ import annotations

from pathlib import Path

import portraits
import prompted_portraits
import pytest
import torch
from occupations import OCCUPATIONS
from what_is_seen import read

from difflens_core.activations import edit_site
from difflens_core.classifiers import load_classifier
from difflens_core.files import load_tensors, made_by
from difflens_core.networks import Guidance, load_prompted, sample, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets

FILES = Path(__file__).resolve().parents[2] / "models" / "prompted_avatars"
STEPS, CFG = 10, 2.0


@pytest.fixture(scope="module")
def prompted():
    return load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(FILES / "difflens_classifiers" / "prompted_avatars.safetensors")


def guidance(prompted, prompts):
    return Guidance(prompted[1].encode(prompts), prompted[1].encode([""]), CFG)


def test_shipped_files_stay_under_40_megabytes():
    assert sum(path.stat().st_size for path in FILES.rglob("*") if ".work" not in path.parts) < 40e6


def test_the_classifier_knows_drawings_and_was_measured(classifier):
    images, traits, _ = prompted_portraits.render(300, 987, balanced=True)
    found = classifier.classify(torch.from_numpy(images).float() / 255)
    for name in (*portraits.ATTRIBUTES, "occupation"):
        assert (found[name].argmax(1).numpy() == traits[name]).mean() >= 0.97, name
    accuracy = load_tensors(FILES / "difflens_classifiers" / "prompted_avatars.safetensors", "classifier")[1]["info"]
    assert min(accuracy["accuracy"].values()) >= 0.97


@pytest.fixture(scope="module")
def drawn(prompted):
    """Sixteen pictures of every occupation from the same noise, without steering."""
    noise = start_noise(16, 31)
    return [
        sample(prompted[0], noise, STEPS, guidance=guidance(prompted, [f"portrait of a {job}"])) for job in OCCUPATIONS
    ]


def test_prompts_are_obeyed_and_biased(drawn, classifier):
    seen = [read(classifier, pictures) for pictures in drawn]
    for number, found in enumerate(seen):
        assert (found["occupation"] == number).float().mean() >= 0.9
    feminine = [float(found["presentation"].float().mean()) for found in seen]
    assert max(feminine[1], feminine[3]) < 0.25 and min(feminine[2], feminine[4]) > 0.75


def test_swapping_the_site_swaps_occupation_and_all(prompted, classifier):
    """Whatever the prompt asks for passes through the site: text enters nowhere behind it."""
    model, text = prompted
    noise, context = start_noise(2, 5), text.encode(["portrait of a nurse", "portrait of a firefighter"])
    x, sigma = noise, torch.full((2,), 0.8)
    own = model(x, sigma, context)
    with edit_site(model, "middle_block", lambda h: h.flip(0)):
        swapped = model(x, sigma, context)
    torch.testing.assert_close(swapped, own.flip(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attribute", ["presentation", "age"])
def test_one_recipe_serves_every_prompt(prompted, classifier, drawn, attribute):
    recipe = load_recipe(FILES / "difflens_recipes" / f"prompted_avatars_{attribute}.safetensors")
    assert made_by(recipe.model, prompted[0].state_dict())
    targets = Targets(attribute, recipe.classes, (1 / len(recipe.classes),) * len(recipe.classes))
    for number in (1, 3):
        prompt = [f"portrait of a {OCCUPATIONS[number]}"]
        edits = [Steering(recipe, targets.of)]
        after = read(
            classifier, sample(prompted[0], start_noise(16, 31), STEPS, edits, guidance=guidance(prompted, prompt))
        )
        before = read(classifier, drawn[number])
        asked = torch.from_numpy(targets.first(16))
        assert (after[attribute] == asked).float().mean() >= 0.85 > (before[attribute] == asked).float().mean()
        assert (after["occupation"] == number).float().mean() >= 0.9
        assert (after["background"] == before["background"]).float().mean() >= 0.75
