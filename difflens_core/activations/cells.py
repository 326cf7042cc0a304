"""Cells of a map: of large maps one position a cell is enough to learn from, and means over cells to tell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FINEST = 256  # cells of a map in which pictures are captured and levels fitted, 16 x 16 of a square one


def coarse(size: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of at most `most` cells of a map of that height and width, the positions if they are no more."""
    if size[0] * size[1] <= most:
        return size
    columns = min(size[1], math.isqrt(most))
    return min(size[0], most // columns), columns


def cells_of(size: tuple[int, int], most: int) -> Tensor:
    """Which of at most `most` cells each position of a map of that height and width lies in: P, int64."""
    rows, columns = coarse(size, most)
    row, column = torch.arange(size[0]) * rows // size[0], torch.arange(size[1]) * columns // size[1]
    return (row[:, None] * columns + column).flatten()


def one_of_each(size: tuple[int, int], most: int, images: Tensor, seed: int) -> Tensor:
    """A random position in each of the cells of a map: B x rows x columns, int64.

    It depends on the picture's number (images: B) and the seed alone, not on the batch.
    """
    drawn = []
    for image in images.tolist():
        generator = torch.Generator().manual_seed((seed * 1_000_003 + image) % 2**63)
        drawn.append(torch.rand(2, *coarse(size, most), generator=generator))
    u, (rows, columns) = torch.stack(drawn, dim=1), coarse(size, most)
    row, column = within(size[0], rows, u[0]), within(size[1], columns, u[1].transpose(1, 2)).transpose(1, 2)
    return row * size[1] + column


def within(side: int, parts: int, u: Tensor) -> Tensor:
    """Positions of a side in its parts (u: B x parts x ..., uniform), as `cells_of` divides it."""
    edges = -(-torch.arange(parts + 1) * side // parts)  # rounded up
    first, count = edges[:-1, None], edges.diff()[:, None]
    return first + (u * count).long()
