"""A small convolutional classifier with one head per attribute: the avatars' own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError, as_half, load_tensors, refuse_whole_numbers, save_tensors
from .readings import by_batches

WIDTHS = (32, 64, 96, 128, 128)


class AttributeClassifier(nn.Module):
    """Reads attributes off pictures. `attributes` maps each name to its classes, in the order of the outputs."""

    def __init__(self, attributes: Mapping[str, tuple[str, ...]], size: int = 64):
        super().__init__()
        self.attributes = {name: tuple(classes) for name, classes in attributes.items()}
        self.size = size
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        flat = WIDTHS[-1] * (size // 2 ** len(WIDTHS)) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(flat, len(c)) for name, c in self.attributes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B x K) of every attribute for pictures B x 3 x size x size in [-1, 1]."""
        features = self.features(x).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B x K) of every attribute for pictures B x 3 x H x W in [0, 1]; of another size they are resized."""
        x = x * 2 - 1
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self(x)

    @torch.inference_mode()
    def classify(self, images: Tensor, batch: int = 64) -> dict[str, Tensor]:
        """See `ImageClassifier.classify`."""

        def read(x: Tensor) -> dict[str, Tensor]:
            return {name: logits.softmax(dim=1) for name, logits in self.logits(x).items()}

        return by_batches(images, batch, next(self.parameters()).device, read)

    def log_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """See `DifferentiableClassifier.log_probabilities`."""
        x = images.to(next(self.parameters()).device).movedim(-1, 1)
        return {name: logits.log_softmax(dim=1) for name, logits in self.logits(x).items()}


def save_classifier(path: str | Path, model: AttributeClassifier, info: Mapping[str, Any]) -> None:
    """Write weights (fp16) with the attributes' names and classes and `info` (accuracy, data)."""
    tensors = {n: as_half(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    save_tensors(path, "classifier", tensors, {"attributes": model.attributes, "size": model.size, "info": dict(info)})


def load_classifier(path: str | Path) -> AttributeClassifier:
    """Read a classifier that `save_classifier` wrote, in evaluation mode. Raises `DiffLensError` if it does not fit."""
    tensors, info = load_tensors(path, "classifier", needs=["attributes", "size"])
    try:
        refuse_whole_numbers(tensors, ("num_batches_tracked",))
        attributes = {name: tuple(classes) for name, classes in info["attributes"].items()}
        model = AttributeClassifier(attributes, info["size"])
        model.load_state_dict(tensors)
    except DiffLensError as error:
        raise DiffLensError(f"{Path(path).name}: {error}") from error
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:  # or what the file says of them is damaged
        reason = " ".join(str(error).split())[:300]
        raise DiffLensError(f"{Path(path).name}: its weights do not fit a DiffLens classifier. {reason}") from error
    return model.eval().requires_grad_(False)
