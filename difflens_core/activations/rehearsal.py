"""Drawing pictures twice: as they are, and with an edit that goes by what the site put out the first time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..files import DiffLensError
from .capture import Edit

Recalled = tuple[Tensor, Tensor, float]  # activations at this evaluation, those at the last one, and its progress


class HoldingEdit(Protocol):
    """An edit that can hold on to unsteered pictures, such as `Steering`."""

    @property
    def site(self) -> str: ...

    def __call__(self, h: Tensor, progress: float, images: Tensor, unsteered: Recalled | None = None) -> Tensor:
        """h' for h (B x C x H x W), as `Edit`; unsteered: what the site put out for these pictures without the edit."""
        ...


@dataclass
class Rehearsal:
    """What `site` puts out while pictures are drawn as they are: an edit that changes nothing and keeps everything.

    The activations stay where they are, B x C x H x W for every evaluation of the network.
    """

    site: str
    seen: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)  # progress, images, activations
    place: int = 0  # of the next to be recalled

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        self.seen.append((progress, images, h.detach().clone()))
        return h

    def recall(self, progress: float, images: Tensor) -> Recalled:
        """What was seen at the evaluation that comes next, which must be of this progress and these pictures."""
        same = self.place < len(self.seen) and self.seen[self.place][0] == progress
        if not same or not torch.equal(self.seen[self.place][1], images):
            raise DiffLensError(
                "hold draws every picture twice by the same steps, and the second time the model was run at others: a "
                "sampler that decides by itself where to go, or a cache. Use another sampler, leave the cache out, or "
                "turn hold off."
            )
        now, self.place = self.seen[self.place][2], self.place + 1
        last = next(one for one in reversed(self.seen) if torch.equal(one[1], images))
        return now, last[2], last[0]


@dataclass(frozen=True)
class Held:
    """`edit` on pictures that were drawn in `rehearsal` before."""

    edit: HoldingEdit
    rehearsal: Rehearsal

    @property
    def site(self) -> str:
        return self.edit.site

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        return self.edit(h, progress, images, self.rehearsal.recall(progress, images))


def draw_held(draw: Callable[[Sequence[Edit]], Tensor], edit: HoldingEdit) -> Tensor:
    """What draw(edits) draws under an edit that holds on to what the same call draws without: twice the work."""
    rehearsal = Rehearsal(edit.site)
    draw([rehearsal])
    return draw([Held(edit, rehearsal)])
