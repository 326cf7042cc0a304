"""What a classifier is to the rest of the pack, and what can be said of its readings."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import DiffLensError

NO_CLASS = -1  # instead of a class: the picture shows none that counts, because no face was found
NO_FACE = "no face"  # a reading beside the attributes: n, 1 for a picture in which no face was found, else 0
MISTAKE = "_reference_mistake"  # ending of an attribute that reads another one as the reference's evaluation does


class ImageClassifier(Protocol):
    """What every function and node that asks for a classifier takes: it reads attributes off pictures.

    attributes: every name with its classes, in the order of the probabilities.
    """

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]: ...

    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities (n x K, fp32, on the CPU) of every attribute for images n x H x W x 3 in [0, 1], of any size.

        May hold more than the attributes: `NO_FACE`, and `left_out` of attributes whose classes are not all there is.
        """
        ...


class DifferentiableClassifier(ImageClassifier, Protocol):
    """A classifier that also tells how a picture would have to change to be read otherwise."""

    def log_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Logarithms (n x K) of what `classify` gives, differentiable by images n x H x W x 3, on its own device.

        With `NO_FACE` as it is there.
        """
        ...


def frames_of(classifier: ImageClassifier, images: Tensor) -> Tensor | None:
    """Squares around the subjects of images n x H x W x 3, if the classifier looks for them: n x 4.

    Left, top, right and bottom as shares of the picture, which they may exceed; NaN where none was found.
    """
    find: Callable[[Tensor], Tensor | None] | None = getattr(classifier, "frames", None)
    return find(images) if find else None


def left_out(attribute: str) -> str:
    """Name of a reading (n): how much of each picture a classifier gives to classes that the attribute leaves out."""
    return f"{attribute}: other classes"


def shares_left_out(read: Mapping[str, Tensor], attribute: str) -> dict[str, float]:
    """What the classes of `attribute` do not speak for: share without a face, and of those with one other classes."""
    shares, known = {}, decided(read)
    if NO_FACE in read:
        shares["no face"] = float(1 - known.float().mean())
    if left_out(attribute) in read:
        shares["other classes"] = float(read[left_out(attribute)][known].mean())
    return shares


def decided(read: Mapping[str, Tensor]) -> Tensor:
    """The pictures that show something to classify (n, bool): all of them, where no face is looked for."""
    if NO_FACE in read:
        return read[NO_FACE] < 0.5
    return torch.ones(len(next(iter(read.values()))), dtype=torch.bool)


def seen(read: Mapping[str, Tensor], attribute: str) -> Tensor:
    """Class probabilities (n x K) of `attribute`; a row of NaN for a picture without a face, which does not count.

    The one way in which experiments, plans and labels look at readings, so that all leave out the same pictures.
    """
    return torch.where(decided(read)[:, None], read[attribute].float(), torch.nan)


def seen_classes(probabilities: Tensor) -> Tensor:
    """The likeliest class (n, int64) by what `seen` gives, or NO_CLASS."""
    return torch.where(probabilities.isnan().any(dim=1), NO_CLASS, probabilities.argmax(dim=1))


def faces_missing(classes: Tensor) -> str:
    """A sentence on the pictures of `seen_classes` that do not count; "" if all do."""
    missing = int((classes == NO_CLASS).sum())
    return f"No face was found in {missing} of {len(classes)} pictures; they do not count." if missing else ""


def labels_of(read: Mapping[str, Tensor], attribute: str, classes: tuple[str, ...]) -> list[str | None]:
    """The class of every picture; None where no face was found."""
    chosen = read[attribute].argmax(dim=1).tolist()
    return [classes[c] if known else None for c, known in zip(chosen, decided(read).tolist(), strict=True)]


def other_attributes(attributes: Mapping[str, Any], attribute: str) -> list[str]:
    """Names of the attributes that say something else than `attribute`, each once."""
    return [name for name in attributes if name != attribute.removesuffix(MISTAKE) and not name.endswith(MISTAKE)]


def labelled(
    read: Mapping[str, Tensor], attributes: Mapping[str, tuple[str, ...]], attribute: str
) -> tuple[Tensor, dict[str, tuple[tuple[str, ...], Tensor]]]:
    """The class of every picture (n, or NO_CLASS), and the same of what says something else: its classes, and n."""
    others = {
        name: (attributes[name], seen_classes(seen(read, name))) for name in other_attributes(attributes, attribute)
    }
    return seen_classes(seen(read, attribute)), others


def label_table(read: Mapping[str, Tensor], attributes: Mapping[str, tuple[str, ...]], attribute: str) -> str:
    """CSV with a line a picture: its class and probabilities of `attribute`, what is left out, its other classes."""
    classes, others = attributes[attribute], other_attributes(attributes, attribute)
    extra = [name for name in (left_out(attribute), NO_FACE) if name in read]
    columns = [
        labels_of(read, attribute, classes),
        *read[attribute].T.tolist(),
        *(read[name].tolist() for name in extra),
    ]
    columns += [labels_of(read, name, attributes[name]) for name in others]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", attribute, *(f"p({name})" for name in classes), *extra, *others])
    for number, row in enumerate(zip(*columns, strict=True), 1):
        writer.writerow([number, *(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row)])
    return text.getvalue()


def by_batches(
    images: Tensor, batch: int, device: torch.device, read: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `read` tells of pictures (b x 3 x H x W in [0, 1], fp32, on `device`), joined on the CPU.

    images: n x H x W x 3 or more, in [0, 1]; what comes after red, green and blue is not looked at.
    """
    if images.ndim != 4 or len(images) == 0:
        raise DiffLensError("the classifier got no images. Connect a batch with at least one picture.")
    parts = []
    for part in images[..., :3].split(batch):
        chunk = part.to(device).movedim(-1, 1).float()
        if not chunk.isfinite().all():
            raise DiffLensError(
                "a picture holds NaN or infinite numbers, so that nothing can be read off it. Look at how it was "
                "sampled."
            )
        parts.append({name: value.float().cpu() for name, value in read(chunk).items()})
    return join_readings(parts)


def join_readings(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was read off all pictures from what was read off consecutive parts of them."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
