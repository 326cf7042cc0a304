"""ResNets as classifiers: FairFace's, and any in torchvision's layout whose outputs are described.

The kind of a file is told by its content. Only tensors are read, never pickled code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import MISTAKE, NO_FACE, ImageClassifier, by_batches, left_out, load_classifier
from .faces import FaceFinder, cut_out, largest_faces
from .files import METADATA_KEY, DiffLensError
from .formats import read_tensors

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's weights began with


@dataclass(frozen=True)
class Readout:
    """How the probabilities of an attribute come from a network's outputs.

    outputs: first output of those that share a softmax, and the one after the last; columns: for every class those of
    them that are added up; whole: what the classes leave out is shared among them, so that they sum to 1.
    """

    classes: tuple[str, ...]
    outputs: tuple[int, int]
    columns: tuple[tuple[int, ...], ...]
    whole: bool = True

    def probabilities(self, logits: Tensor) -> Tensor:
        """n x classes from n x outputs."""
        part = logits[:, slice(*self.outputs)]
        # logarithms, so that nothing is divided by a tiny sum
        sums = torch.stack([part[:, list(added)].logsumexp(dim=1) for added in self.columns], dim=1)
        return sums.softmax(dim=1) if self.whole else (sums - part.logsumexp(dim=1, keepdim=True)).exp()

    @property
    def missing(self) -> list[int]:
        """Columns that no class has."""
        used = {column for added in self.columns for column in added}
        return [column for column in range(self.outputs[1] - self.outputs[0]) if column not in used]

    def share_left_out(self, logits: Tensor) -> Tensor:
        """n: the probability of the columns that no class has."""
        return logits[:, slice(*self.outputs)].softmax(dim=1)[:, self.missing].sum(dim=1)


# FairFace (Karkkainen and Joo 2021), the model with seven races. Outputs: 0-6 White, Black, Latino_Hispanic, East
# Asian, Southeast Asian, Indian, Middle Eastern; 7-8 Male, Female; 9-17 ages 0-2, 3-9, 10-19, ... 60-69, 70 and more.
RACES = ("white", "black", "asian", "indian")
FAIRFACE = {
    "gender": Readout(("male", "female"), (7, 9), ((0,), (1,))),
    "age": Readout(("young", "adult", "old"), (9, 18), ((0, 1, 2), (3, 4, 5, 6), (7, 8))),
    "race": Readout(RACES, (0, 7), ((0,), (1,), (3, 4), (5,))),
    # The paper's reference code takes the first four columns, so Latino_Hispanic for Asian and East Asian for Indian,
    # and does not make them sum to 1.
    f"race{MISTAKE}": Readout(RACES, (0, 7), ((0,), (1,), (2,), (3,)), whole=False),
}
FAIRFACE_OUTPUTS = 18
FAIRFACE_NOTES = (
    "age: young is 0 to 19, adult 20 to 59, old 60 and more",
    "race: asian is East Asian and Southeast Asian; Latino_Hispanic and Middle Eastern are left out, the others are "
    "made to sum to 1",
    f"race{MISTAKE}: columns as in the reference's evaluation (Latino_Hispanic for asian, East Asian for indian), only "
    "to compare with its figures",
    "the classes are FairFace's guesses from pictures, not what people are",
)


class ResNetClassifier(nn.Module):
    """A ResNet with readouts; with `faces` it looks at the largest face only, and at the whole picture without one.

    size: side of the square that pictures or faces are resized to; mean, std: what each colour is normalised by.
    """

    def __init__(
        self,
        network: nn.Module,
        readouts: Mapping[str, Readout],
        size: int = SIZE,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        faces: FaceFinder | None = None,
    ):
        super().__init__()
        self.network, self.readouts, self.size, self.faces = network, dict(readouts), size, faces
        self.attributes = {name: readout.classes for name, readout in readouts.items()}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @torch.inference_mode()
    def classify(self, images: Tensor, batch: int = 32) -> dict[str, Tensor]:
        """See `ImageClassifier.classify`."""

        def read(x: Tensor) -> dict[str, Tensor]:
            if self.faces is None:
                found, told = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True), {}
            else:
                boxes = largest_faces(self.faces(x))
                found, told = cut_out(x, boxes, self.size), {NO_FACE: boxes.isnan().any(dim=1)}
            logits = self.network((found - self.mean) / self.std).float()
            for name, readout in self.readouts.items():
                told[name] = readout.probabilities(logits)
                if readout.missing:
                    told[left_out(name)] = readout.share_left_out(logits)
            return told

        return by_batches(images, batch, self.mean.device, read)


def load_any_classifier(path: str | Path, faces: FaceFinder | None = None) -> tuple[ImageClassifier, str]:
    """The classifier in a file of any known format, in evaluation mode, and a report of what was loaded.

    Known are DiffLens's own, FairFace's ResNet-34 (seven races) and ResNets of torchvision's layout with a description
    (`description`). `faces`: look at faces only, for the ResNets. Raises `DiffLensError` for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffLensError(f"{path}: no such file. Expected a classifier.")
    tensors, info = read_tensors(path), description(path)
    if "kind" in info:
        if faces:
            raise DiffLensError(f"{path.name}: this classifier looks at whole pictures. Set face_detector to none.")
        model = load_classifier(path)
        lines = ["format: DiffLens", f"input: whole pictures, {model.size} x {model.size}"]
        return model, "\n".join([*lines, *attribute_lines(model)])
    if not {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight", "fc.bias"} <= tensors.keys():
        raise DiffLensError(
            f"{path.name}: not a classifier of a known format. Tensors: {', '.join(list(tensors)[:6]) or 'none'}. "
            "Known are DiffLens's own, FairFace's ResNet-34 and ResNets in torchvision's layout."
        )
    try:
        network, name = build_resnet(tensors)
        outputs = tensors["fc.bias"].numel()
        notes, settings = (), {}
        if info:
            readouts, settings = described(info, outputs)
        elif (name, outputs) == ("ResNet-34", FAIRFACE_OUTPUTS):
            readouts, notes, name = FAIRFACE, FAIRFACE_NOTES, "FairFace, ResNet-34"
        else:
            raise DiffLensError(
                f"a {name} with {outputs} outputs, and nothing says what they mean. Put {path.name}.json beside it: "
                '{"attributes": {"NAME": ["CLASS", ...]}}, the classes in the order of the outputs.'
            )
    except DiffLensError as error:
        raise DiffLensError(f"{path.name}: {error}") from error
    model = ResNetClassifier(network, readouts, faces=faces, **settings).eval().requires_grad_(False)
    area = "the largest face, or the whole picture where there is none" if faces else "whole pictures"
    lines = [f"format: {name}", f"input: {area}, {model.size} x {model.size}", *attribute_lines(model)]
    return model, "\n".join([*lines, *(f"note: {note}" for note in notes)])


def attribute_lines(model: ImageClassifier) -> list[str]:
    return [f"{name}: {', '.join(classes)}" for name, classes in model.attributes.items()]


def build_resnet(weights: Mapping[str, Tensor]) -> tuple[nn.Module, str]:
    """A ResNet of torchvision's layout and its name, its depth read off the names of the weights."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise DiffLensError(f"tensor {name} holds NaN or infinite numbers. The file is damaged.")
    try:
        from torchvision.models import resnet
    except (ImportError, RuntimeError) as error:  # the latter where its build does not fit torch's
        raise DiffLensError(
            f"needs torchvision, which does not load ({error}). Install the torchvision that belongs to your torch."
        ) from error
    bottleneck = "layer1.0.conv3.weight" in weights
    blocks = [len({m[1] for name in weights if (m := re.match(rf"layer{i}\.(\d+)\.", name))}) for i in range(1, 5)]
    with torch.device("meta"):  # no time for random weights
        kind = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        network = resnet.ResNet(kind, blocks, num_classes=weights["fc.bias"].numel())
    name = f"ResNet-{sum(blocks) * (3 if bottleneck else 2) + 2}"
    full = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    try:
        network.load_state_dict(full, assign=True)
    except RuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise DiffLensError(f"looks like a {name} of torchvision, but its weights do not fit one. {reason}") from error
    return network, name


def description(path: Path) -> dict[str, Any]:
    """What `<file>.json`, or else the metadata of a safetensors file, says about a classifier. Empty if nothing."""
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        source, text = beside.name, beside.read_bytes()
    else:
        try:
            with safe_open(path, framework="pt") as file:
                source, text = f"{path.name}'s metadata", (file.metadata() or {}).get(METADATA_KEY, "{}")
        except SafetensorError:
            return {}  # a PyTorch file, which has no metadata
    try:
        info = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DiffLensError(f"{source} is not readable JSON ({error}).") from error
    if not isinstance(info, dict):
        raise DiffLensError(f"{source} holds a {type(info).__name__}, expected an object with attributes.")
    return info


def described(info: Mapping[str, Any], outputs: int) -> tuple[dict[str, Readout], dict[str, Any]]:
    """Readouts and settings (size, mean, std, as far as given) from a description of `outputs` outputs."""
    attributes = info.get("attributes")
    if not isinstance(attributes, dict) or not attributes or not all(map(are_classes, attributes.values())):
        raise DiffLensError(
            'its description lacks attributes, expected {"attributes": {"NAME": ["CLASS", ...]}} with two different '
            "classes or more each."
        )
    total = sum(map(len, attributes.values()))
    if total != outputs:
        raise DiffLensError(f"it has {outputs} outputs, but its description has {total} classes. Name one for each.")
    readouts, start = {}, 0
    for name, classes in attributes.items():
        readouts[name] = Readout(
            tuple(classes), (start, start + len(classes)), tuple((c,) for c in range(len(classes)))
        )
        start += len(classes)
    settings = {name: info[name] for name in ("size", "mean", "std") if name in info}
    size = settings.get("size", SIZE)
    if not isinstance(size, int) or not 32 <= size <= 4096:
        raise DiffLensError(f"its description says size {size!r}, expected a number of pixels from 32 to 4096.")
    for name in settings.keys() - {"size"}:
        if not are_colours(settings[name]) or (name == "std" and min(settings[name]) <= 0):
            raise DiffLensError(f"its description says {name} {settings[name]!r}, expected a number for each colour.")
    return readouts, settings


def are_classes(value: Any) -> bool:
    strings = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return strings and len(set(value)) == len(value) >= 2


def are_colours(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
    return numbers and len(value) == 3 and all(map(math.isfinite, value))
