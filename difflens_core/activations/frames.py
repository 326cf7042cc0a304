"""Activations in the subject's own frame: a grid over its box, wherever in the picture and however large it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from .captured import ROWS, Activations

GRID = 8  # cells a side of the frame


def into_frames(h: Tensor, frames: Tensor) -> Tensor:
    """Maps (B x C x H x W) in frames (B x 4: left, top, right, bottom as shares of the map): B x C x GRID x GRID, fp32.

    Linear between positions; beyond the map its edge goes on.
    """
    h = h.float()
    frames = frames.to(h)
    centre, half = (frames[:, 2:] + frames[:, :2]) - 1, frames[:, 2:] - frames[:, :2]
    return F.grid_sample(h, sampled_at(half, centre, (GRID, GRID)), padding_mode="border", align_corners=False)


def out_of_frames(maps: Tensor, frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B x C x GRID x GRID) of frames (B x 4) laid back into maps of that height and width.

    Linear between cells, 0 outside of the frame, to which it falls within half a cell on both sides of the edge.
    """
    frames = frames.to(maps)
    side = frames[:, 2:] - frames[:, :2]
    centre = (1 - frames[:, 2:] - frames[:, :2]) / side
    return F.grid_sample(maps, sampled_at(1 / side, centre, size), align_corners=False)


def slopes_in_frames(slopes: Tensor, frames: Tensor) -> Tensor:
    """How maps of frames (B x C x GRID x GRID) move what moves by `slopes` (B x C x H x W) with what they add.

    The transpose of `out_of_frames`.
    """
    with torch.enable_grad():
        maps = slopes.new_zeros(*slopes.shape[:2], GRID, GRID).requires_grad_()
        laid = out_of_frames(maps, frames, (slopes.shape[2], slopes.shape[3]))
    return torch.autograd.grad(laid, maps, slopes)[0]


def sampled_at(scale: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the cells of a grid of that height and width lie after scaling and moving (B x 2 each): B x H x W x 2."""
    theta = torch.cat([torch.diag_embed(scale), centre[:, :, None]], dim=2)
    return F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)


@dataclass(frozen=True)
class FramedActivations(Activations):
    """Captured activations as their subjects' frames (B x 4, as shares of the picture) hold them.

    A picture without a subject (NaN) is taken whole.
    """

    frames: Tensor = field(default_factory=lambda: torch.zeros(0, 4))

    @classmethod
    def of(cls, activations: Activations, frames: Tensor) -> FramedActivations:
        """The same activations in frames."""
        return cls(**{of.name: getattr(activations, of.name) for of in fields(Activations)}, frames=frames)

    @property
    def whole(self) -> Activations:
        """The same activations as they were captured."""
        return Activations(**{of.name: getattr(self, of.name) for of in fields(Activations)})

    @property
    def known_frames(self) -> Tensor:
        """The frames, where there are none those of the whole pictures."""
        return torch.where(self.frames.isnan(), torch.tensor([0.0, 0.0, 1.0, 1.0]), self.frames)

    @property
    def map(self) -> tuple[int, int]:
        """See `Activations.map`; here that of a frame."""
        return GRID, GRID

    @property
    def full_map(self) -> tuple[int, int]:
        """See `Activations.full_map`; here that of a frame."""
        return self.map

    @property
    def positions(self) -> int:
        return GRID**2

    @property
    def values(self) -> Tensor:
        """All as one tensor S x B x C x GRID x GRID: a copy in memory."""
        return torch.stack([into_frames(values, self.known_frames) for values in self.whole.values])

    def batches(self, step: int, rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
        """See `Activations.batches`; in fp32."""
        for first, values in self.whole.batches(step, rows):
            yield first, into_frames(values, self.known_frames[first : first + len(values)])

    def part(self, start: int, stop: int) -> Activations:
        """See `Activations.part`."""
        return FramedActivations.of(self.whole.part(start, stop), self.frames[start:stop])
