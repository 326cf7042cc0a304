"""A classifier from a file of any known kind, told by its content. Only tensors are read, never pickled code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import DiffLensError, read_json, read_tensors, reading, told
from .convolutional import FramedClassifier, are_classes, check_side, load_classifier
from .faces import FaceFinder
from .readings import ImageClassifier
from .resnets import (
    FAIRFACE,
    FAIRFACE_4,
    FAIRFACE_4_NOTES,
    FAIRFACE_NOTES,
    FAIRFACE_OUTPUTS,
    SIZE,
    Readout,
    ResNetClassifier,
    build_resnet,
    races_of_fairface,
)


def load_any_classifier(path: str | Path, faces: FaceFinder | None = None) -> tuple[ImageClassifier, str]:
    """The classifier in a file of any known format, in evaluation mode, and a report of what was loaded.

    Known are DiffLens's own, FairFace's ResNet-34s (seven or four races) and ResNets of torchvision's layout with a
    description (`description`). `faces`: look at faces only, for the ResNets. Raises `DiffLensError` for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffLensError(f"{path}: no such file. Expected a classifier.")
    tensors, info = read_tensors(path), description(path)
    if "kind" in info:
        if faces:
            raise DiffLensError(f"{path.name}: this classifier looks for no faces. Set face_detector to none.")
        own = load_classifier(path)
        area = "where the figure is found" if isinstance(own, FramedClassifier) else "whole pictures"
        lines = ["format: DiffLens", f"input: {area}, {own.size} x {own.size}"]
        return own, "\n".join([*lines, *attribute_lines(own)])
    if not {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight", "fc.bias"} <= tensors.keys():
        raise DiffLensError(
            f"{path.name}: not a classifier of a known format. Tensors: {', '.join(list(tensors)[:6]) or 'none'}. "
            "Known are DiffLens's own, FairFace's ResNet-34 and ResNets in torchvision's layout."
        )
    with reading(path):
        network, name = build_resnet(tensors)
        outputs = tensors["fc.bias"].numel()
        notes: tuple[str, ...] = ()
        settings: dict[str, Any] = {}
        if info:
            readouts, settings = described(info, outputs)
        elif (name, outputs) == ("ResNet-34", FAIRFACE_OUTPUTS):
            races, note = races_of_fairface(network.get_parameter("fc.weight"), path.name)
            readouts, notes = (FAIRFACE, FAIRFACE_NOTES) if races == 7 else (FAIRFACE_4, FAIRFACE_4_NOTES)
            notes, name = notes + ((note,) if note else ()), "FairFace, ResNet-34"
        else:
            raise DiffLensError(
                f"a {name} with {outputs} outputs, and nothing says what they mean. Put {path.name}.json beside it: "
                '{"attributes": {"NAME": ["CLASS", ...]}}, the classes in the order of the outputs.'
            )
    model = ResNetClassifier(network, readouts, faces=faces, **settings).eval().requires_grad_(False)
    area = "the largest face, or the whole picture where there is none" if faces else "whole pictures"
    lines = [f"format: {name}", f"input: {area}, {model.size} x {model.size}", *attribute_lines(model)]
    return model, "\n".join([*lines, *(f"note: {note}" for note in notes)])


def attribute_lines(model: ImageClassifier) -> list[str]:
    return [f"{name}: {', '.join(classes)}" for name, classes in model.attributes.items()]


def description(path: Path) -> dict[str, Any]:
    """What `<file>.json`, or else the metadata of a safetensors file, says about a classifier. Empty if nothing."""
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        return read_json(beside)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError):
        return {}  # a PyTorch file, which has no metadata
    with reading(path):
        return told(metadata)


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
    check_side(size, "its description")
    for name in settings.keys() - {"size"}:
        if not are_colours(settings[name]) or (name == "std" and min(settings[name]) <= 0):
            raise DiffLensError(f"its description says {name} {settings[name]!r}, expected a number for each colour.")
    return readouts, settings


def are_colours(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
    return numbers and len(value) == 3 and all(map(math.isfinite, value))
