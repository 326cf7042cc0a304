"""Classes given by prompts, against a softmax of cosines written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from difflens_core.classifiers import ZeroShotClassifier, class_directions, parse_prompts
from difflens_core.files import DiffLensError


def embed(images: torch.Tensor) -> torch.Tensor:
    """Six numbers of a picture that depend on all its pixels."""
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
    return images.flatten(1) @ weight


def texts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    return [torch.randn(prompts, 6, generator=draw) * scale for prompts, scale in ((1, 9.0), (3, 0.1), (2, 1.0))]


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def test_probabilities_are_a_softmax_of_a_hundred_cosines():
    pictures = torch.rand(5, 2, 2, 3, generator=torch.Generator().manual_seed(7))
    classifier = ZeroShotClassifier({"mood": ("glad", "sad", "calm")}, class_directions(texts()), embed)
    found = classifier.classify(pictures, batch=2)["mood"]
    for i, picture in enumerate(embed(pictures).tolist()):
        logits = []
        for prompts in texts():
            rows = [unit(row) for row in prompts.tolist()]
            mean = unit([sum(column) / len(rows) for column in zip(*rows, strict=True)])
            logits.append(100 * sum(a * b for a, b in zip(unit(picture), mean, strict=True)))
        powers = [math.exp(logit - max(logits)) for logit in logits]
        assert found[i].tolist() == pytest.approx([power / sum(powers) for power in powers], abs=2e-5)
    torch.testing.assert_close(classifier.classify(pictures, batch=5)["mood"], found)


def test_prompts_are_read():
    assert parse_prompts("young: a child | a: b\n\n  old :an old person ") == {
        "young": ["a child", "a: b"], "old": ["an old person"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got 0 classes"),
        ("young: a child", "got 1 classes"),
        ("young\nold: b", 'the line "young" is not understood'),
        ("young:\nold: b", 'the line "young:" is not understood'),
        (": a\nold: b", "is not understood"),
        ("young: a | \nold: b", "is not understood"),
        ("young: a\nyoung: b", "young comes twice"),
    ],
)
def test_bad_prompts_are_refused(text, message):
    with pytest.raises(DiffLensError, match=message):
        parse_prompts(text)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_damaged_text_encoder_is_refused(value):
    with pytest.raises(DiffLensError, match="zero or not finite"):
        class_directions([torch.ones(1, 4), torch.full((2, 4), value)])


def test_pictures_with_nan_are_refused():
    classifier = ZeroShotClassifier({"mood": ("glad", "sad", "calm")}, class_directions(texts()), embed)
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        classifier.classify(torch.full((1, 2, 2, 3), math.nan))
