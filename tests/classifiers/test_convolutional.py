"""The attribute classifier: probabilities, sizes, refusals and its file."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from torch.nn import functional as F

from difflens_core.classifiers import (
    AttributeClassifier,
    decided,
    label_table,
    load_classifier,
    other_attributes,
    save_classifier,
    shares_left_out,
)
from difflens_core.classifiers.readings import MISTAKE, NO_FACE, left_out
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


READ = {
    "race": torch.tensor([[0.2, 0.8], [0.7, 0.3]]),
    f"race{MISTAKE}": torch.tensor([[0.1, 0.2], [0.3, 0.1]]),
    "age": torch.tensor([[0.9, 0.1], [0.4, 0.6]]),
    left_out("race"): torch.tensor([0.25, 0.5]),
    NO_FACE: torch.tensor([0.0, 1.0]),
}
CLASSES = {"race": ("a", "b"), f"race{MISTAKE}": ("a", "b"), "age": ("young", 'o,"ld')}


def test_labels_travel_as_csv():
    rows = list(csv.reader(io.StringIO(label_table(READ, CLASSES, "race"))))
    assert rows == [
        ["picture", "race", "p(a)", "p(b)", "race: other classes", "no face", "age"],
        ["1", "b", "0.2000", "0.8000", "0.2500", "0.0000", "young"],
        ["2", "", "0.7000", "0.3000", "0.5000", "1.0000", ""],
    ]
    assert (
        label_table({"age": READ["age"]}, {"age": CLASSES["age"]}, "age").splitlines()[2] == '2,"o,""ld",0.4000,0.6000'
    )


def test_other_readings_of_an_attribute_are_no_other_attributes():
    assert other_attributes(CLASSES, "race") == ["age"]
    assert other_attributes(CLASSES, f"race{MISTAKE}") == ["age"]
    assert other_attributes(CLASSES, "age") == ["race"]


def test_what_is_left_out_is_reported_by_reason():
    assert shares_left_out(READ, "race") == {"no face": 0.5, "other classes": 0.25}
    assert shares_left_out(READ, "age") == {"no face": 0.5}
    assert decided({"age": READ["age"]}).tolist() == [True, True]
