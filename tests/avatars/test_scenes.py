"""People in scenes: figures are found and read at every size, and one recipe serves all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenes
import torch
from make_scenes import everywhere
from occupations import OCCUPATIONS
from prompted_portraits import phrase
from what_is_seen import read

from difflens_core.classifiers import load_classifier
from difflens_core.files import load_tensors, made_by
from difflens_core.networks import load_prompted, sample, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets

FILES = Path(__file__).resolve().parents[2] / "models" / "scenes"
STEPS, PICTURES = 10, 16


@pytest.fixture(scope="module")
def model():
    return load_prompted(FILES / "difflens_models" / "scenes.safetensors")


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(FILES / "difflens_classifiers" / "scenes.safetensors")


def test_shipped_files_stay_under_20_megabytes():
    assert sum(path.stat().st_size for path in FILES.rglob("*") if ".work" not in path.parts) < 20e6


@pytest.mark.parametrize("size", scenes.SIZES)
def test_the_classifier_finds_and_reads_drawings_of_every_size(classifier, size):
    images, traits, _, frames = scenes.render(150, 987, balanced=True, size=size)
    pictures = torch.from_numpy(images).float() / 255
    found = classifier.classify(pictures)
    for name in scenes.ATTRIBUTES:
        assert (found[name].argmax(1).numpy() == traits[name]).mean() >= 0.97, name
    assert (classifier.frames(pictures) - torch.from_numpy(frames)).abs().mean() < 0.05
    told = load_tensors(FILES / "difflens_classifiers" / "scenes.safetensors", "classifier")[1]["info"]["accuracy"]
    assert min(told[" x ".join(map(str, size))].values()) >= 0.97


@pytest.mark.parametrize(("size", "success"), [(size, 0.8) for size in scenes.SIZES])
def test_one_recipe_serves_every_size(model, classifier, size, success):
    """In pictures of 96 x 128 some figures are larger than most of those it was made on."""
    recipe = load_recipe(FILES / "difflens_recipes" / "scenes_presentation.safetensors")
    assert made_by(recipe.model, model[0].state_dict()) and recipe.changes is not None
    noise, doctor = start_noise(PICTURES, 31, *size), OCCUPATIONS.index("doctor")
    guidance = everywhere(model[1], phrase([], "doctor"), size, PICTURES)
    targets = Targets("presentation", recipe.classes, (0.5, 0.5))
    before, after = (
        read(classifier, sample(model[0], noise, STEPS, edits, guidance=guidance))
        for edits in ([], [Steering(recipe, targets.of)])
    )
    asked = torch.from_numpy(targets.first(PICTURES))
    assert (after["presentation"] == asked).float().mean() >= success > (before["presentation"] == asked).float().mean()
    assert (after["occupation"] == doctor).float().mean() >= success
    assert (after["background"] == before["background"]).float().mean() >= 0.85
