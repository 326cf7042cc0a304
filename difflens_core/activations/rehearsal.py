"""Drawing pictures twice: first as they are, then with edits that hold on to what the site put out the first time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from ..files import DiffLensError
from .capture import Edit, Sampler

LET_GO = 0.25  # share of a picture's largest change from which a position may be drawn anew


class Shown(NamedTuple):
    """What a site put out (B x C x H x W) at the last step of the same pictures without the edit; progress: of that."""

    h: Tensor
    progress: float


class HoldingEdit(Protocol):
    """An edit that can hold on to the unsteered pictures, such as `Steering`. holds: whether it is to."""

    @property
    def site(self) -> str: ...
    @property
    def holds(self) -> bool: ...

    def acts(self, progress: float) -> bool:
        """Whether it is for this part of the sampling."""
        ...

    def __call__(self, h: Tensor, progress: float, images: Tensor, shown: Shown | None = None) -> Tensor:
        """h' for h (B x C x H x W), as `Edit`; shown: where the edit reads what the pictures show."""
        ...


def holds(edit: Edit | HoldingEdit) -> TypeGuard[HoldingEdit]:
    """Whether the edit is to hold on to the unsteered pictures, so that `draw_held` must draw."""
    return getattr(edit, "holds", False)


@dataclass
class Rehearsal:
    """What `site` puts out while pictures are drawn the first time: an edit that changes nothing and keeps everything.

    seen: of the pictures of a batch, by their numbers: progress and activations of every evaluation in turn. They stay
    on the device where they were made.
    """

    site: str
    seen: dict[tuple[int, ...], list[tuple[float, Tensor]]] = field(default_factory=dict)

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        self.seen.setdefault(tuple(images.tolist()), []).append((progress, h.detach().clone()))
        return h

    @property
    def last(self) -> dict[tuple[int, ...], Shown]:
        """What was seen of each batch in the end."""
        return {pictures: Shown(h, at) for pictures, seen in self.seen.items() for at, h in seen[-1:]}


@dataclass
class Held:
    """`edit` on pictures that were drawn in `rehearsal` before; without one it does not hold.

    chain: all edits of the site that hold, in their order; they hold together, in the last of them that acts. visits:
    how often which activations were asked for.
    """

    edit: HoldingEdit
    rehearsal: Rehearsal | None = None
    chain: Sequence[HoldingEdit] = ()
    visits: Counter = field(default_factory=Counter)

    @property
    def site(self) -> str:
        return self.edit.site

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        if self.rehearsal is None:
            return self.edit(h, progress, images)
        unsteered, shown = self.recall(self.rehearsal, progress, tuple(images.tolist()))
        now = self.edit(h, progress, images, shown)
        chain = [edit for edit in self.chain if edit.acts(progress)]
        if not chain or self.edit is not chain[-1]:
            return now
        then = unsteered
        for edit in chain:
            then = edit(then, progress, images, shown)
        return now if then is unsteered else mixed(now, then, then - unsteered, progress)

    def recall(self, rehearsal: Rehearsal, progress: float, pictures: tuple[int, ...]) -> tuple[Tensor, Shown]:
        """The first time's activations of these pictures at this progress, and at the last step.

        Where the model is run at other steps than then (samplers that decide by themselves where to go, caches), the
        nearest serve. A step may take several evaluations: of conditionings for areas, or of a sampler of higher order;
        the one in the same turn serves.
        """
        if pictures not in rehearsal.seen:
            raise DiffLensError(
                "hold draws every picture twice, and the second time they came in other batches than the first. Set "
                "hold to off."
            )
        seen = rehearsal.seen[pictures]
        nearest = min((at for at, _ in seen), key=lambda at: abs(at - progress))
        turn, end = self.visits[pictures, nearest], seen[-1][0]
        self.visits[pictures, nearest] += 1
        then, last = ([h for at, h in seen if at == wanted] for wanted in (nearest, end))
        return then[turn % len(then)], Shown(last[turn % len(last)], end)


def mixed(now: Tensor, then: Tensor, change: Tensor, progress: float) -> Tensor:
    """What a site that holds puts out, all B x C x H x W.

    now: its output edited; then: that of the unsteered pictures edited; change: what the edits change of those. Early
    steps lay out the picture and draw it all over again where they are steered, so they follow `then`; late ones draw
    its edges, for which the model must see what it has drawn, and follow `now`. Positions that change less than
    `LET_GO` of the picture's largest change are held on to beyond that, in proportion; with a larger share, the outline
    of what a picture loses, such as long hair, shows through. A picture that is not changed is left as it is.
    """
    size = torch.linalg.vector_norm(change, dim=1, keepdim=True, dtype=torch.float32)
    largest = size.amax(dim=(2, 3), keepdim=True)
    share = progress * (size / (LET_GO * largest)).clamp(max=1)
    return torch.where(largest > 0, torch.lerp(then, now, share.to(now.dtype)), now)


def second_time(edits: Sequence[Edit | HoldingEdit], rehearsal: Rehearsal) -> list[Edit]:
    """The edits for the second time; those that hold at the rehearsal's site do so together, others do not hold."""
    chain = [edit for edit in edits if holds(edit) and edit.site == rehearsal.site]

    def again(edit: Edit | HoldingEdit) -> Edit:
        if not holds(edit):
            return edit
        return Held(edit, rehearsal, chain) if edit.site == rehearsal.site else Held(edit)

    return [again(edit) for edit in edits]


def draw_held(draw: Callable[[Sequence[Edit]], Tensor], edits: Sequence[Edit | HoldingEdit]) -> Tensor:
    """draw(edits), and before that once without those that hold, so that they can hold on to that.

    At another site than the first of them an edit does not hold, because what is seen there the first time lacks what
    the others change.
    """
    rehearsal = Rehearsal(next(edit.site for edit in edits if holds(edit)))
    draw([rehearsal, *(edit for edit in edits if not holds(edit))])
    return draw(second_time(edits, rehearsal))


@dataclass(frozen=True)
class ByPlace:
    """An edit that is told the places of the pictures in the batch instead of their numbers in the run.

    Experiments draw one noise several times in a batch, each time with another edit.
    """

    edit: Edit

    @property
    def site(self) -> str:
        return self.edit.site

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        return self.edit(h, progress, torch.arange(len(images)))


def innermost(edit: Any) -> Any:
    """The edit that others carry out in a way of their own, such as `Held` and `ByPlace`."""
    return innermost(edit.edit) if hasattr(edit, "edit") else edit


@dataclass(frozen=True)
class Drawer:
    """`Draw` for a sampler and a fixed set of noises (n x shape)."""

    sampler: Sampler
    noise: Tensor

    def latents(self, edits: Sequence[Edit | HoldingEdit], which: Tensor) -> Tensor:
        """See `Draw.latents`; edits that hold do."""

        def sample(own: Sequence[Edit]) -> Tensor:
            return self.sampler.sample(self.noise[which], which, [ByPlace(edit) for edit in own])

        return draw_held(sample, edits) if any(map(holds, edits)) else sample(edits)

    def pictures(self, latents: Tensor) -> Tensor:
        """See `Draw.pictures`."""
        return self.sampler.decode(latents)

    def __call__(self, edits: Sequence[Edit | HoldingEdit], which: Tensor) -> Tensor:
        """Both in one go."""
        return self.pictures(self.latents(edits, which))
