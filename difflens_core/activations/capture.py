"""What edits and keeps activations while pictures are sampled, and the noises that pictures start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor


class Edit(Protocol):
    """Something that edits what module `site` puts out, such as `Steering`."""

    @property
    def site(self) -> str: ...

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        """h' for h (B x C x H x W); progress: 0 to 1; images: B, numbers of the pictures, on the CPU."""


# Pictures (B x H x W x 3 in [0, 1], on the CPU), each from the noise of that number (B, int64) in a fixed set, under
# edits that number the pictures of the batch from 0. How experiments sample, whatever the host.
Draw = Callable[[Sequence[Edit], Tensor], Tensor]


def noise_batches(shape: Sequence[int], count: int, seed: int, batch: int) -> Iterator[Tensor]:
    """The noise of pictures 0 .. count-1 of a run (each of `shape`), `batch` at a time, as if drawn at once."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # torch draws in blocks of 16 numbers: only where a batch fills its last block do the next ones begin anew.
    piece = count if prod(shape) * batch % 16 or prod(shape) * count % 16 else batch
    for first in range(0, count, piece):
        yield from torch.randn(min(piece, count - first), *shape, generator=generator).split(batch)


@dataclass(frozen=True)
class Kept:
    """An edit that changes nothing and keeps what `site` puts out at every step (B x C x H x W), on the CPU."""

    site: str
    dtype: torch.dtype = torch.float16
    outputs: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        # A copy, because later layers of some models write into this tensor.
        self.outputs.append(h.detach().to("cpu", self.dtype, copy=True))
        return h
