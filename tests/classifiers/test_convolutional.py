"""The attribute classifier: probabilities, sizes, refusals and its file."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from difflens_core.classifiers import AttributeClassifier, load_classifier, save_classifier
from difflens_core.files import DiffLensError, load_tensors, save_tensors

ATTRIBUTES = {"presentation": ("masculine", "feminine"), "age": ("young", "adult", "senior")}


@pytest.fixture
def model() -> AttributeClassifier:
    torch.manual_seed(0)
    model = AttributeClassifier(ATTRIBUTES, 32)
    model(torch.randn(16, 3, 32, 32) * 2)  # batch norm sees some data
    return model.eval()


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(1))


def test_probabilities_are_the_softmax_of_pictures_scaled_to_minus_one_to_one(model):
    found = model.classify(images(3))
    logits = model((images(3) * 2 - 1).permute(0, 3, 1, 2))
    for name, classes in ATTRIBUTES.items():
        assert found[name].shape == (3, len(classes))
        torch.testing.assert_close(found[name], logits[name].softmax(dim=1))


def test_batches_of_any_size_give_the_same_probabilities(model):
    for name, expected in model.classify(images(7), batch=7).items():
        torch.testing.assert_close(model.classify(images(7), batch=3)[name], expected, atol=1e-6, rtol=1e-5)


def test_pictures_of_another_size_are_resized_and_alpha_is_ignored(model):
    small = F.interpolate(images(2, 64).permute(0, 3, 1, 2), (32, 32), mode="bilinear", antialias=True)
    expected = model.classify(small.permute(0, 2, 3, 1))["age"]
    torch.testing.assert_close(model.classify(images(2, 64))["age"], expected, atol=1e-5, rtol=1e-4)
    with_alpha = torch.cat([images(2), torch.zeros(2, 32, 32, 1)], dim=-1)
    assert torch.equal(model.classify(with_alpha)["age"], model.classify(images(2))["age"])


@pytest.mark.parametrize("shape", [(0, 32, 32, 3), (32, 32, 3)])
def test_no_images_are_refused(model, shape):
    with pytest.raises(DiffLensError, match="got no images"):
        model.classify(torch.zeros(shape))


def test_round_trip(model, tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(path, model, {"accuracy": 0.9})
    found = load_classifier(path)
    assert found.attributes == ATTRIBUTES and found.size == 32 and not found.training
    for name, expected in model.classify(images(4)).items():
        torch.testing.assert_close(found.classify(images(4))[name], expected, atol=5e-3, rtol=1e-2)


def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(path, model, {})
    tensors, info = load_tensors(path, "classifier")
    info["attributes"]["age"] = ["young", "old"]
    save_tensors(path, "classifier", tensors, info)
    with pytest.raises(DiffLensError, match="do not fit a DiffLens classifier"):
        load_classifier(path)


def test_pictures_with_nan_are_refused(model):
    pictures = images(3)
    pictures[1, 0, 0, 0] = torch.nan
    with pytest.raises(DiffLensError, match="a picture holds NaN"):
        model.classify(pictures)
