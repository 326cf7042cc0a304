"""The activations of one site, captured while pictures were sampled, and ways to read them without loading them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..files import DiffLensError

ROWS = 4096  # that are read at once
WINDOW = 2**31  # bytes of shards that a training step draws from: what fits in main memory beside the rest


@dataclass(frozen=True)
class Activations:
    """What a site put out while a set of pictures was sampled, in memory or in the files of a `Store`.

    shards: each S x b x C x H x W (steps, some of the pictures, channels, map), fp16, bf16 or fp32, on the CPU, with
    the channels of a position side by side in memory (another layout is copied; one tensor counts as one shard);
    progress: S, share of the sampling that lies behind each step; site: its name, such as "middle_block"; model:
    fingerprint of the weights, "" if not known; size: height and width of the site's map where of each of its cells
    one position was captured, else None; twins: so many pictures in turn were drawn from the same noise.
    """

    shards: tuple[Tensor, ...]
    progress: Tensor
    site: str
    model: str = ""
    size: tuple[int, int] | None = None
    twins: int = 1

    def __post_init__(self) -> None:
        shards = (self.shards,) if isinstance(self.shards, Tensor) else self.shards
        for shard in shards:
            if shard.ndim != 5 or 0 in shard.shape:
                raise DiffLensError(
                    f"activations have shape {tuple(shard.shape)}, expected steps x pictures x channels x height x "
                    "width with at least one of each. Capture at least one picture."
                )
        object.__setattr__(self, "shards", tuple(channels_last(shard) for shard in shards))

    @property
    def pictures(self) -> int:
        return sum(shard.shape[1] for shard in self.shards)

    @property
    def width(self) -> int:
        return self.shards[0].shape[2]

    @property
    def positions(self) -> int:
        return self.shards[0].shape[3:].numel()

    @property
    def map(self) -> tuple[int, int]:
        """Height and width of the map that the positions form."""
        height, width = self.shards[0].shape[3:]
        return height, width

    @property
    def full_map(self) -> tuple[int, int]:
        """Height and width of the site's map, also where only some of its positions were captured."""
        return self.size or self.map

    @property
    def rows_in_all(self) -> int:
        """Rows of `width` numbers: steps x pictures x positions."""
        return len(self.progress) * self.pictures * self.positions

    @property
    def values(self) -> Tensor:
        """All as one tensor S x B x C x H x W: a copy in memory if there is more than one shard."""
        return self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards, dim=1)

    def batches(self, step: int, rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
        """All pictures of a step in turn: the number of the first, and values b x C x H x W.

        They have at most `rows` positions together; a picture larger than that comes alone. Raises `DiffLensError` at
        NaN or infinite numbers.
        """
        first, size = 0, max(1, rows // self.positions)
        for shard in self.shards:
            for values in shard[step].split(size):
                if not torch.isfinite(values).all():
                    raise DiffLensError(
                        f"the activations of {self.site} hold NaN or infinite numbers (step {step + 1}, pictures "
                        f"{first} to {first + len(values) - 1}). Check the model's precision, or capture again."
                    )
                yield first, values
                first += len(values)

    def part(self, start: int, stop: int) -> Activations:
        """Pictures start .. stop - 1, renumbered from 0. Copies nothing."""
        shards, first = [], 0
        for shard in self.shards:
            count = shard.shape[1]
            if first < stop and start < first + count:
                shards.append(shard[:, max(0, start - first) : stop - first])
            first += count
        return replace(self, shards=tuple(shards))

    def rows(self, picks: Tensor) -> Tensor:
        """Rows (n x C, in the shards' type) of the flat (step, picture, position) indices `picks` (n)."""
        step, place = picks // (self.pictures * self.positions), picks % self.positions
        picture = picks // self.positions % self.pictures
        firsts = torch.tensor([0, *(shard.shape[1] for shard in self.shards)]).cumsum(0)
        shard_of = torch.bucketize(picture, firsts[1:], right=True)
        order = shard_of.argsort()
        found = torch.empty(len(picks), self.width, dtype=self.shards[0].dtype)
        for mine in order.split(torch.bincount(shard_of, minlength=len(self.shards)).tolist()):
            if len(mine):
                number = int(shard_of[mine[0]])
                found[mine] = gather(self.shards[number], step[mine], picture[mine] - firsts[number], place[mine])
        return found

    def draw(self, count: int, seed: int, step: int, window: int = WINDOW) -> Tensor:
        """Flat indices (count) of the rows that training step `step` looks at: a function of seed and step alone.

        Uniform over all rows if the shards take at most `window` bytes. Of more, a training step draws from as many
        neighbours in a shuffled ring of the shards as fit, and moves on to the next shard when it has drawn as many
        rows as a shard holds: every file is read once a round, in one piece, and stays in memory while it serves.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        served = self.served_shards(count, seed, step, window)
        ends = torch.tensor([shard.shape[1] for shard in self.shards]).cumsum(0).tolist()
        pictures = torch.cat([torch.arange(ends[i] - self.shards[i].shape[1], ends[i]) for i in served])
        picks = torch.randint(len(self.progress) * len(pictures) * self.positions, (count,), generator=generator)
        step_of, place = picks // (len(pictures) * self.positions), picks % self.positions
        picture = pictures[picks // self.positions % len(pictures)]
        return (step_of * self.pictures + picture) * self.positions + place

    def served_shards(self, count: int, seed: int, step: int, window: int) -> list[int]:
        """Numbers of the shards that training step `step` draws `count` rows from, ascending. See `draw`."""
        shards = len(self.shards)
        largest = max(shard.numel() * shard.element_size() for shard in self.shards)
        length = max(1, window // largest)
        if length >= shards:
            return list(range(shards))
        ring = torch.randperm(shards, generator=torch.Generator().manual_seed(seed)).tolist()
        begin = step * count * shards // self.rows_in_all
        return sorted(ring[(begin + i) % shards] for i in range(length))


def channels_last(shard: Tensor) -> Tensor:
    """S x b x C x H x W whose positions lie in memory as H x W x C: the tensor itself if so already, else a copy."""
    by_position = shard.movedim(2, -1)
    return shard if by_position[0, 0].is_contiguous() else by_position.contiguous().movedim(-1, 2)


def gather(shard: Tensor, step: Tensor, picture: Tensor, place: Tensor) -> Tensor:
    """Rows (n x C) of a channels-last shard, which may be a slice of a larger one. Far faster than fancy indexing."""
    steps, pictures, width = shard.shape[:3]
    positions = shard.shape[3:].numel()
    per_step, per_picture = shard.stride(0) // width, shard.stride(1) // width
    count = (steps - 1) * per_step + (pictures - 1) * per_picture + positions
    return shard.as_strided((count, width), (width, 1)).index_select(0, step * per_step + picture * per_picture + place)
