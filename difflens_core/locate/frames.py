"""Where the subject of a picture is, read off what a site puts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import Activations, FramedActivations
from ..classifiers import NO_CLASS
from ..sae import Normalisation, SparseAutoencoder

FRAME = ("weight", "bias")  # tensors of `FrameProbes`
SIDE = "size of the subject"
STILL = 0.5  # positions that the edges of frames may vary by (standard deviation) in pictures that are aligned

SHRINKAGE = 1e-3  # of the readouts, beside the mean variance of what they read
CORE = (0.35, 0.45)  # of the frame's width and height, from its centre: which positions are the subject's
SURE = 0.4  # a picture whose surest position is less so has no subject
READOUTS = 4  # whether a position is the subject's, how far right and down of it the centre is, logarithm of the side


@dataclass(frozen=True)
class FrameProbes:
    """Linear readouts (S x 4 x width, bias S x 4) of normalised rows: at each position the subject's frame is guessed.

    The first tells how surely the position is the subject's, the others where the frame's centre is, in positions from
    there, and the logarithm of its side, in positions.
    """

    weight: Tensor
    bias: Tensor

    def find(self, rows: Tensor, size: tuple[int, int], step: int) -> Tensor:
        """Frames (B x 4: left, top, right, bottom as shares of the map) by rows B x width x P of a map of that size.

        Every position's guess counts by the square of how surely it is the subject's.
        """
        told = self.told(rows, step)
        sure = told[:, 0].clamp(0, 1).square() + 1e-6
        share = (sure / sure.sum(dim=1, keepdim=True))[:, None]
        here = torch.cat([places(size).to(told), told.new_zeros(1, told.shape[2])])
        x, y, side = ((told[:, 1:] + here) * share).sum(dim=2).unbind(dim=1)
        half = side.exp() / 2
        edges = torch.stack([x - half, y - half, x + half, y + half], dim=1)
        return edges / edges.new_tensor([size[1], size[0], size[1], size[0]])

    def empty(self, rows: Tensor, step: int) -> Tensor:
        """Which of the pictures of such rows have no subject: B. Only late steps can tell."""
        return self.told(rows, step)[:, 0].amax(dim=1) < SURE

    def told(self, rows: Tensor, step: int) -> Tensor:
        """What every position guesses: B x 4 x P."""
        return torch.einsum("rw,bwp->brp", self.weight[step], rows) + self.bias[step][:, None]

    def to(self, device: torch.device) -> FrameProbes:
        """The same on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))


def aligned(frames: Tensor, size: tuple[int, int]) -> bool:
    """Whether pictures with these frames (B x 4) have their subject at the same place of a map of that size.

    Pictures in which none was found (NaN) do not count.
    """
    edges = in_positions(frames[~frames.isnan().any(dim=1)], size)
    return len(edges) < 2 or bool((edges.std(dim=0) < STILL).all())


def in_frames(activations: Activations, frames: Tensor | None, sae: SparseAutoencoder) -> Activations:
    """The activations in their subjects' frames (B x 4), if there are any and they are not all at one place.

    An SAE that reads the whole map at once leaves no positions to follow, and twins need no frames: what changes is
    read off each position.
    """
    if (
        frames is None
        or sae.kernel > 1
        or activations.twins > 1
        or len(frames) != activations.pictures
        or aligned(frames, activations.map)
    ):
        return activations
    return FramedActivations.of(activations, frames)


def in_positions(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Edges (B x 4) of frames in positions of a map of that height and width."""
    return frames * torch.tensor([size[1], size[0], size[1], size[0]])


def sides(activations: FramedActivations) -> tuple[tuple[str, ...], Tensor]:
    """How large the subjects are, in thirds: a trait like any other, B, for what a position shows depends on it."""
    edges = in_positions(activations.frames, activations.whole.map)
    side = edges[:, 3] - edges[:, 1]
    known = ~side.isnan()
    thirds = torch.bucketize(side, side[known].quantile(torch.tensor([1 / 3, 2 / 3])))
    return ("small", "middle", "large"), torch.where(known, thirds, NO_CLASS)


def places(size: tuple[int, int]) -> Tensor:
    """Centres of the positions of a map of that height and width, in positions: 2 x P, x and y."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return torch.stack([x, y]).flatten(1)


@torch.no_grad()
def fit_frames(
    activations: FramedActivations, normalisation: Normalisation, on_step: Callable[[int], None] = lambda step: None
) -> FrameProbes:
    """Readouts of the captured pictures' frames, by one ridge regression a step.

    In closed form from X^T X and X^T y; where a position is not the subject's only the first readout is asked for.
    """
    whole = activations.whole
    height, width = whole.full_map
    edges = in_positions(activations.frames, whole.full_map)
    centre, side = (edges[:, :2] + edges[:, 2:]) / 2, (edges[:, 3] - edges[:, 1])
    apart = torch.tensor([[width / whole.map[1]], [height / whole.map[0]]])  # of what was captured, in positions
    offset = centre[:, :, None] - places(whole.map) * apart  # B x 2 x P
    # Where there is no subject all is NaN, and nothing is the subject's.
    core = (offset.abs() < side[:, None, None] * torch.tensor(CORE)[:, None]).all(dim=1)
    wanted = torch.cat([core[:, None].float(), offset, side.log()[:, None, None].expand(-1, 1, core.shape[1])], dim=1)
    wanted = wanted.nan_to_num(0.0)
    weights, biases = [], []
    for s, progress in enumerate(whole.progress):
        step, all_of, own_of = normalisation.step_at(float(progress)), torch.zeros(()), torch.zeros(())
        for first, values in whole.batches(s):
            rows = normalisation.apply(values, step)
            x = torch.cat([rows, torch.ones(*rows.shape[:2], 1), wanted[first : first + len(rows)].transpose(1, 2)], 2)
            own = x[core[first : first + len(rows)]].double()
            flat = x.flatten(0, 1).double()
            all_of, own_of = all_of + flat.T @ flat, own_of + own.T @ own
        parts = [solved(all_of, 0, rows.shape[2]), *(solved(own_of, k, rows.shape[2]) for k in range(1, READOUTS))]
        weights.append(torch.stack([part[:-1] for part in parts]))
        biases.append(torch.stack([part[-1] for part in parts]))
        on_step(s + 1)
    return FrameProbes(torch.stack(weights).float(), torch.stack(biases).float())


def solved(products: Tensor, readout: int, width: int) -> Tensor:
    """Coefficients (width + 1, the constant last) of a readout, by the products of (rows, 1, what is wanted)."""
    own = products[: width + 1, : width + 1].clone()
    own.diagonal()[:-1] += SHRINKAGE * own.diagonal()[:-1].mean()
    return torch.linalg.solve(own, products[: width + 1, width + 1 + readout])
