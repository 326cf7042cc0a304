"""The classifier that finds its figure: what it reads is what is in the frame, at any size of picture."""

from __future__ import annotations

import pytest
import torch

from difflens_core.classifiers import FramedClassifier, cut_frame, load_any_classifier, load_classifier, save_classifier
from difflens_core.classifiers.convolutional import MARGIN, corners

FIGURE, WHOLE = {"age": ("young", "old")}, {"background": ("plain", "street", "shelf")}


@pytest.fixture(scope="module")
def classifier() -> FramedClassifier:
    torch.manual_seed(4)
    return FramedClassifier(FIGURE, WHOLE).eval().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (96, 64)])
def test_what_is_cut_is_where_the_frame_is(height, width):
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    frame = torch.tensor([[0.5, 0.6, 0.4]])
    left, top, right, bottom = corners(frame, height / width)[0].tolist()
    assert bottom - top == pytest.approx(0.4) and (right - left) * width == pytest.approx(0.4 * height)
    cut = cut_frame(torch.stack([x, y, x])[None], frame, 32)[0]
    steps = ((torch.arange(32) + 0.5) / 32 - 0.5) * MARGIN
    torch.testing.assert_close(cut[0, 0], 0.5 + steps * (right - left), atol=1e-3, rtol=0)
    torch.testing.assert_close(cut[1, :, 0], 0.6 + steps * 0.4, atol=1e-3, rtol=0)


def test_attributes_are_read_off_the_frame_or_off_the_whole(classifier):
    x = torch.rand(2, 3, 64, 96)
    read = classifier.logits(x)
    torch.testing.assert_close(read["background"], classifier.whole.logits(x)["background"])
    inside = cut_frame(x, classifier.found(x), classifier.size)
    torch.testing.assert_close(read["age"], classifier.figure.logits(inside)["age"])
    images = x.movedim(1, -1)
    told = classifier.classify(images)
    torch.testing.assert_close(told["age"], read["age"].softmax(dim=1))
    frames = classifier.frames(images)
    torch.testing.assert_close(frames, corners(classifier.found(x), 64 / 96))
    assert classifier.attributes == FIGURE | WHOLE


def test_it_can_be_differentiated_by_the_picture(classifier):
    images = torch.rand(2, 64, 64, 3, requires_grad=True)
    told = classifier.log_probabilities(images)
    (slope,) = torch.autograd.grad(told["age"][:, 0].sum() + told["background"][:, 0].sum(), images)
    assert slope.abs().max() > 0


def test_it_is_read_as_it_was_written(classifier, tmp_path):
    path = tmp_path / "framed.safetensors"
    save_classifier(path, classifier, {})
    again, images = load_classifier(path), torch.rand(2, 48, 80, 3)
    for name, value in classifier.classify(images).items():
        torch.testing.assert_close(again.classify(images)[name], value, atol=2e-2, rtol=0)
    assert "where the figure is found" in load_any_classifier(path)[1]
