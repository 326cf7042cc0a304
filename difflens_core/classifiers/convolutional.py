"""Small convolutional classifiers with one head per attribute: the avatars' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError, as_half, load_tensors, refuse_whole_numbers, save_tensors
from .readings import by_batches

WIDTHS = (32, 64, 96, 128, 128)
MARGIN = 1.1  # side of what is read beside the frame's


class ByLogits(nn.Module):
    """What classifiers share that give `logits` of pictures in [0, 1]."""

    logits: Callable[[Tensor], dict[str, Tensor]]

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


class AttributeClassifier(ByLogits):
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


class FramedClassifier(ByLogits):
    """Finds the one figure of a picture and reads attributes off it, and others off the whole picture.

    figure, whole: the attributes that are read off each, with their classes. The frame is not differentiated through.
    """

    def __init__(self, figure: Mapping[str, tuple[str, ...]], whole: Mapping[str, tuple[str, ...]]):
        super().__init__()
        self.finder = AttributeClassifier({"frame": ("x", "y", "side")})
        self.figure, self.whole = AttributeClassifier(figure), AttributeClassifier(whole)

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        return self.figure.attributes | self.whole.attributes

    @property
    def size(self) -> int:
        """Side of what is read, in pixels."""
        return self.figure.size

    def found(self, x: Tensor) -> Tensor:
        """Frames (B x 3: centre as shares of width and height, side as a share of height) of pictures B x 3 x H x W."""
        return self.finder.logits(x)["frame"]

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B x K) of every attribute for pictures B x 3 x H x W in [0, 1], of any height and width."""
        inside = cut_frame(x, self.found(x).detach(), self.size)
        return self.figure.logits(inside) | self.whole.logits(x)

    @torch.inference_mode()
    def frames(self, images: Tensor, batch: int = 64) -> Tensor:
        """Left, top, right and bottom (n x 4, as shares of the picture) of the figures of images n x H x W x 3."""

        def find(x: Tensor) -> dict[str, Tensor]:
            return {"frame": corners(self.found(x), x.shape[2] / x.shape[3])}

        return by_batches(images, batch, next(self.parameters()).device, find)["frame"]


def corners(frames: Tensor, height_by_width: float) -> Tensor:
    """Left, top, right and bottom (B x 4) of frames as `FramedClassifier.found` gives them."""
    x, y, side = frames.unbind(dim=1)
    across = side * height_by_width
    return torch.stack([x - across / 2, y - side / 2, x + across / 2, y + side / 2], dim=1)


def cut_frame(x: Tensor, frames: Tensor, size: int) -> Tensor:
    """What is in frames (B x 3, see `found`) and a margin around (B x 3 x size x size), beyond the picture its edge."""
    frames = frames.to(x)
    across = frames[:, 2] * x.shape[2] / x.shape[3]
    zero = torch.zeros_like(across)
    theta = torch.stack([
        torch.stack([MARGIN * across, zero, 2 * frames[:, 0] - 1], dim=1),
        torch.stack([zero, MARGIN * frames[:, 2], 2 * frames[:, 1] - 1], dim=1),
    ], dim=1)  # fmt: skip
    grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def save_classifier(path: str | Path, model: AttributeClassifier | FramedClassifier, info: Mapping[str, Any]) -> None:
    """Write weights (fp16) with the attributes' names and classes and `info` (accuracy, data)."""
    tensors = {n: as_half(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    framed = {"whole": list(model.whole.attributes)} if isinstance(model, FramedClassifier) else {}
    plain = {"attributes": model.attributes, "size": model.size, **framed, "info": dict(info)}
    save_tensors(path, "classifier", tensors, plain)


def are_classes(value: Any) -> bool:
    strings = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return strings and len(set(value)) == len(value) >= 2


def check_side(size: Any, what: str) -> None:
    """Raise `DiffLensError` unless `size` can be the side of what a classifier reads; `what` says it."""
    if type(size) is not int or not 32 <= size <= 4096:
        raise DiffLensError(f"{what} says size {size!r}, expected a number of pixels from 32 to 4096.")


def load_classifier(path: str | Path) -> AttributeClassifier | FramedClassifier:
    """Read a classifier that `save_classifier` wrote, in evaluation mode. Raises `DiffLensError` if it does not fit."""
    tensors, info = load_tensors(path, "classifier", needs=["attributes", "size"])
    try:
        check_side(info["size"], "it")
        refuse_whole_numbers(tensors, ("num_batches_tracked",))
        if not all(map(are_classes, info["attributes"].values())):
            raise DiffLensError("its attributes do not have two different classes or more each. The file is damaged.")
        attributes = {name: tuple(classes) for name, classes in info["attributes"].items()}
        model: AttributeClassifier | FramedClassifier
        if "whole" in info:
            whole = {name: attributes.pop(name) for name in info["whole"]}
            model = FramedClassifier(attributes, whole)
        else:
            model = AttributeClassifier(attributes, info["size"])
        model.load_state_dict(tensors)
    except DiffLensError as error:
        raise DiffLensError(f"{Path(path).name}: {error}") from error
    except Exception as error:  # or what it says is damaged, which brings up anything
        reason = " ".join(str(error).split())[:300]
        raise DiffLensError(f"{Path(path).name}: its weights do not fit a DiffLens classifier. {reason}") from error
    return model.eval().requires_grad_(False)
