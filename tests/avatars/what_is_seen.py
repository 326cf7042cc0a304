"""What a classifier sees in pictures that a small model drew."""

from __future__ import annotations

from torch import Tensor

from difflens_core.classifiers import AttributeClassifier


def read(classifier: AttributeClassifier, pictures: Tensor) -> dict[str, Tensor]:
    """The class (B) of every attribute, of pictures B x 3 x H x W in [-1, 1]."""
    return {name: p.argmax(1) for name, p in classifier.classify(pictures.movedim(1, -1) / 2 + 0.5).items()}
