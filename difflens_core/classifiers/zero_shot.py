"""Classes given by prompts: CLIP compares every picture with the texts of the classes (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import DiffLensError
from .readings import by_batches

LOGIT_SCALE = 100.0  # what CLIP's training ends at, by its own limit


def parse_prompts(text: str) -> dict[str, list[str]]:
    """Prompts of every class, from a line a class: `name: prompt`, or `name: prompt | prompt | ...`.

    Raises `DiffLensError` if a line is not of this form, a name comes twice, or there are less than two classes.
    """
    classes: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, rest = (part.strip() for part in line.partition(":"))
        prompts = [prompt.strip() for prompt in rest.split("|")]
        if not name or not colon or not all(prompts):
            raise DiffLensError(f'the line "{line}" is not understood. Write "name: prompt", a class a line.')
        if name in classes:
            raise DiffLensError(f"{name} comes twice. Put its prompts into one line, with | between them.")
        classes[name] = prompts
    if len(classes) < 2:
        raise DiffLensError(f'got {len(classes)} classes, expected at least 2. Write "name: prompt", a class a line.')
    return classes


def class_directions(texts: Sequence[Tensor]) -> Tensor:
    """Unit vector of every class (K x d): the mean of its prompts' unit embeddings, texts: K of prompts x d."""
    unit = torch.stack([F.normalize(text.float(), dim=1).mean(dim=0) for text in texts])
    if not unit.isfinite().all() or not unit.norm(dim=1).all():
        raise DiffLensError("the text embeddings are zero or not finite. Load another CLIP: this one seems damaged.")
    return F.normalize(unit, dim=1)


@dataclass(frozen=True)
class ZeroShotClassifier:
    """Softmax over the classes of 100 times the cosine between a picture's and the class's CLIP embeddings.

    attributes: one, with its classes; directions: K x d, of `class_directions`; embed: embeddings (b x d) of pictures
    b x H x W x 3 in [0, 1], in the space of the texts.
    """

    attributes: Mapping[str, tuple[str, ...]]
    directions: Tensor
    embed: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def classify(self, images: Tensor, batch: int = 16) -> dict[str, Tensor]:
        """See `ImageClassifier.classify`."""
        (attribute,) = self.attributes

        def read(x: Tensor) -> dict[str, Tensor]:
            pictures = F.normalize(self.embed(x.movedim(1, -1)).float().cpu(), dim=1)
            return {attribute: (LOGIT_SCALE * pictures @ self.directions.T).softmax(dim=1)}

        return by_batches(images, batch, torch.device("cpu"), read)
