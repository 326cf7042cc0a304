"""What nodes make of a classifier's readings and of recipes that need their SAE, in this process (see `inside.py`)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from difflens_core.classifiers import NO_CLASS
from difflens_core.classifiers.readings import NO_FACE
from difflens_core.steer import recipe_from_features
from difflens_core.targets import LEFT_ALONE

SCHEDULE = (1, "euler", "normal", 5)
CLASSES = ("dark", "light")


class Tone:
    """Classifier that tells light from dark pictures, and green from blue; where a corner is red it finds no face."""

    attributes = {"tone": CLASSES, "hue": ("green", "blue")}

    def __init__(self, middle: float):
        self.middle = middle

    def classify(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        light = (100 * (images.mean(dim=(1, 2, 3)) - self.middle)).sigmoid()
        red = (images[:, 0, 0, 0] > images[:, 0, 0, 1:].amax(dim=1) + 0.1).float()
        hues = images[..., 1:3].mean(dim=(1, 2)).softmax(dim=1)
        return {"tone": torch.stack([1 - light, light], dim=1), "hue": hues, NO_FACE: red}


@pytest.fixture(scope="module")
def given(inside, toys) -> dict:
    """What experiments sample, a recipe of which only the SAE tells where it acts, and that SAE."""
    model, vae = inside.model("SD1.5"), inside.host.pixel_space_vae()
    width = inside.host.site_width(model, "middle_block")
    sae = replace(toys.sae(width=width), site="middle_block")
    drawn = inside.sample(model, inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5", 32), seed=5)
    return {
        "sampled": (model, inside.prompt("SD1.5", 1), inside.latent("SD1.5", 16), vae),
        "classifier": Tone(float(vae.decode(drawn)[..., :3].mean(dim=(1, 2, 3)).median())),
        "recipe": recipe_from_features(sae, "tone", {"dark": [0, 1, 2], "light": [3, 4]}, "scale"), "sae": sae,
    }  # fmt: skip


def test_a_recipe_that_needs_its_sae_is_calibrated_and_watched_with_it(inside, given):
    node = inside.pack_module("nodes.calibrate")
    sampled, classifier, recipe = given["sampled"], given["classifier"], given["recipe"]
    settings = ("uniform", 160, 0.02, 0.9, False, *SCHEDULE)
    with pytest.raises(inside.DiffLensError, match="^Calibrate: .* only their SAE can tell"):
        node.Calibrate.execute(*sampled, classifier, recipe, *settings)
    found = node.Calibrate.execute(*sampled, classifier, recipe, *settings, sae=given["sae"]).result
    record = json.loads(found[3])
    assert record["mode"] == "scale" and record["fresh"]["counted"] <= 32 and len(found[0].strength) == 2
    with pytest.raises(inside.DiffLensError, match="^Cross Effects: .* only their SAE can tell"):
        node.CrossEffects.execute(*sampled, classifier, {"recipe0": recipe}, 8, *SCHEDULE)
    table = node.CrossEffects.execute(*sampled, classifier, {"recipe0": recipe}, 8, *SCHEDULE, sae=given["sae"])
    assert "hue" in table.result[0]
    for kind, later in ((node.Calibrate, ["sae", "spare_others"]), (node.CrossEffects, ["sae"])):
        last = kind.define_schema().inputs[-len(later) :]  # graphs of older versions hold the others by their place
        assert [each.id for each in last] == later and all(each.optional for each in last)
    inside.forget()


def test_rank_by_effect_refuses_a_recipe_of_another_model(inside, given, toys):
    node = inside.pack_module("nodes.explore").RankByEffect
    other = replace(toys.recipe(width=6), attribute="tone", classes=CLASSES, strength=(1.0, 1.0), site="middle_block")
    with pytest.raises(inside.DiffLensError, match="^Rank by Effect: .* with 6 channels, this model's has"):
        node.execute(*given["sampled"], given["classifier"], other, "amplify", 1.0, 2, 2, *SCHEDULE)


def test_a_picture_without_a_face_has_no_label_and_no_place_in_a_plan(inside, given):
    images = torch.full((8, 4, 4, 3), 0.1)
    images[6:] = 0.9
    images[[1, 7], 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    classifier = Tone(0.5)
    labels, csv = inside.pack_module("nodes.classify").ClassifyImages.execute(images, classifier, "tone").result
    assert labels.indices.tolist() == [0, NO_CLASS, 0, 0, 0, 0, 1, NO_CLASS]
    assert (next(iter(labels.others.values()))[1] == NO_CLASS).nonzero().flatten().tolist() == [1, 7]
    plan = inside.pack_module("nodes.calibrate").PlanTargets
    recipe = replace(given["recipe"], info={})
    targets, words = plan.execute(classifier, images, {"recipe0": recipe}, "uniform", 0).result
    asked = targets[0].of(torch.arange(8)).tolist()
    assert asked[1] == asked[7] == LEFT_ALONE and sorted(asked) == [LEFT_ALONE] * 6 + [1] * 2
    assert words.startswith("2 of 6 pictures change") and "No face was found in 2 of 8" in words


class OnDevice(torch.Tensor):
    """A tensor that is not on the CPU, as far as numpy is asked for it: images under --gpu-only."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_images_on_another_device_are_shown(inside):
    images = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    to_bytes = inside.pack_module("nodes.report").to_bytes
    assert (to_bytes(images.as_subclass(OnDevice)) == to_bytes(images)).all()
