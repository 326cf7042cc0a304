"""How experiments draw pictures: in batches, counted, and never the same one twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import Draw, Edit
from ..classifiers import NO_CLASS, faces_missing
from ..files import DiffLensError, load_tensors, reading, save_tensors
from ..sae import SparseAutoencoder
from ..steer import Recipe, steerings, with_settings
from ..targets import LEFT_ALONE

TOGETHER = 64  # pictures that are sampled before the first of them is decoded
LEFT_OUT = -1.0  # in a file, instead of the NaN of pictures that do not count: files of ours hold none

Job = tuple[Sequence[Edit], Tensor]  # edits, and which noises (B)


def readings(
    draw: Draw, jobs: Iterable[Job], read: Callable[[Tensor], Any], on_sampled: Callable[[int], None]
) -> Iterator[Any]:
    """What read(pictures) tells of every job in turn.

    on_sampled is told how many pictures are sampled, and may raise to cancel: what is sampled by then is read first.
    """
    waiting: list[Tensor] = []
    done = 0

    def read_waiting() -> Iterator[Any]:
        while waiting:
            yield read(draw.pictures(waiting.pop(0)))

    for edits, which in jobs:
        try:
            waiting.append(draw.latents(edits, which))
            done += len(which)
            on_sampled(done)
        except BaseException:
            yield from read_waiting()
            raise
        if sum(map(len, waiting)) >= TOGETHER:
            yield from read_waiting()
    yield from read_waiting()


@dataclass
class Trials:
    """Draws pictures under a recipe and keeps what the classifier read, so that none is ever drawn twice.

    classify(images) gives the class probabilities (B x K), as `seen`: NaN for pictures that do not count. known: by
    picture, class asked for and its strength. With `folder` they are kept there too, a file a batch: a calibration
    that was cut off goes on where it stopped.
    """

    recipe: Recipe
    draw: Draw
    classify: Callable[[Tensor], Tensor]
    batch: int
    on_batch: Callable[[int], None]
    folder: Path | None = None
    known: dict[tuple[int, int, float], np.ndarray] = field(default_factory=dict)
    sae: SparseAutoencoder | None = None

    def __post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            kept, _ = load_tensors(file, "calibration", ("keys", "read"))
            with reading(file):
                if kept["read"].shape[1:] != (len(self.recipe.classes),):
                    raise DiffLensError(f"its readings are not of {len(self.recipe.classes)} classes. Delete the file.")
                of_all = np.where(kept["read"].numpy() == LEFT_OUT, np.nan, kept["read"].numpy())
                for (picture, asked, strength), read in zip(kept["keys"].tolist(), of_all, strict=True):
                    self.known[int(picture), int(asked), strength] = read

    def read(self, pictures: np.ndarray, asked: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Class probabilities (n x K) of `pictures` (n) steered to `asked` (n) with `strength` (K)."""
        amounts = [0.0 if c == LEFT_ALONE else float(strength[c]) for c in asked]
        keys = list(zip(pictures.tolist(), asked.tolist(), amounts, strict=True))
        missing = [key for key in dict.fromkeys(keys) if key not in self.known]
        recipe = with_settings(self.recipe, strength=tuple(strength.tolist()))
        parts = [missing[first : first + self.batch] for first in range(0, len(missing), self.batch)]
        begun = len(self.known)

        def job(part: Sequence[tuple[int, int, float]]) -> Job:
            which, classes = (torch.tensor([key[i] for key in part]) for i in (0, 1))
            return steerings(recipe, classes.__getitem__, self.sae), which

        found = readings(self.draw, map(job, parts), self.classify, lambda done: self.on_batch(begun + done))
        for part, read in zip(parts, found, strict=True):
            drawn = read.cpu().double().numpy()
            self.save(part, drawn)
            self.known |= dict(zip(part, drawn, strict=True))
        return np.stack([self.known[key] for key in keys])

    def save(self, keys: Sequence[tuple[int, int, float]], read: np.ndarray) -> None:
        """Write one batch, under the number of its first reading."""
        if self.folder:
            of_all = np.where(np.isnan(read), LEFT_OUT, read)
            tensors = {"keys": torch.tensor(keys, dtype=torch.float64), "read": torch.from_numpy(of_all)}
            save_tensors(self.folder / f"{len(self.known):08}.safetensors", "calibration", tensors, {})


@dataclass
class Run:
    """Draws in batches and tells how many of `total` pictures are done."""

    sample: Draw
    batch: int
    total: int
    on_picture: Callable[[int, int], None]
    done: int = field(default=0)

    def draw(self, which: Tensor, edits: Callable[[Tensor], Sequence[Edit]]) -> Tensor:
        """Pictures of noises `which`; `edits(rows)` gives the edits of a batch that holds `rows` of them."""
        jobs, begun = ((edits(rows), which[rows]) for rows in torch.arange(len(which)).split(self.batch)), self.done

        def on_sampled(done: int) -> None:
            self.done = begun + done
            self.on_picture(self.done, self.total)

        return torch.cat([*readings(self.sample, jobs, torch.Tensor.cpu, on_sampled)])


def shown_classes(labels: Tensor, attribute: str, classes: tuple[str, ...]) -> list[int]:
    """Classes that at least two pictures show. Raises `DiffLensError` if there are not two of them.

    labels: n, NO_CLASS for a picture that does not count.
    """
    counts = torch.bincount(labels[labels != NO_CLASS], minlength=len(classes)).tolist()
    shown = [c for c, count in enumerate(counts) if count >= 2]
    if len(shown) < 2:
        seen = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        raise DiffLensError(
            f"{attribute}: among {len(labels)} pictures are {seen}; two classes must be shown by at least 2 pictures "
            f"each. Draw more pictures. {faces_missing(labels)}".rstrip()
        )
    return shown
