"""Sampling seen from inside: edits of what sites put out, what is kept of it, and any sampler that runs both."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..files import DiffLensError
from .cells import FINEST, one_of_each
from .differentiable import OnPrediction
from .sites import Whole, edit_site
from .store import DTYPES, INDEX, MOST, SAMPLES, SIZE, TWINS, Index, Shard, Store, read_index, record

# How errors that are no `torch.cuda.OutOfMemoryError` say that there was no memory: of the processor, oneDNN, Apple ...
NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "could not create a primitive", "ALLOC_FAILED",
)  # fmt: skip
Drawn = TypeVar("Drawn")


class Edit(Protocol):
    """Something that edits what module `site` puts out, such as `Steering`."""

    @property
    def site(self) -> str: ...

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        """h' for h (B x C x H x W); progress: 0 to 1; images: B, numbers of the pictures, on the CPU."""
        ...


@dataclass
class Kept:
    """What `site` puts out at some `steps` of the sampling of one batch, on the CPU.

    Of a map with more than `most` positions (0: none has), one is kept at random in each of so many cells, another one
    at every step: by the pictures' numbers `images` (B) and `seed`; the same one in all steps and `twins`. size: that
    map's height and width.
    """

    site: str
    steps: Sequence[int]
    dtype: torch.dtype = torch.float16
    most: int = 0
    images: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    seed: int = 0
    twins: int = 1
    size: tuple[int, int] | None = None
    values: Tensor | None = None
    seen: set[int] = field(default_factory=set)

    def keep(self, step: int, h: Tensor) -> None:
        """Keep h (B x C x H x W) if the step is one of those wanted."""
        if step not in self.steps:
            return
        by_position = self.some(h.detach(), step).movedim(1, -1)
        if self.values is None:
            self.values = torch.empty(len(self.steps), *by_position.shape, dtype=self.dtype)
        self.values[self.steps.index(step)] = by_position
        self.seen.add(step)

    def some(self, h: Tensor, step: int) -> Tensor:
        """The positions of h that are kept, as a map."""
        size = (h.shape[2], h.shape[3])
        if not 0 < self.most < size[0] * size[1]:
            return h
        self.size, images = size, self.images.repeat_interleave(len(h) // len(self.images))
        another = step if self.twins == 1 else 0
        picks = one_of_each(size, self.most, images // self.twins, self.seed + another).to(h.device)
        flat = picks.flatten(1)[:, None].expand(-1, h.shape[1], -1)
        return h.flatten(2).gather(2, flat).unflatten(2, picks.shape[1:])

    def taken(self) -> Tensor:
        """S x B x H x W x C. Raises `DiffLensError` if a step was not seen."""
        if self.values is None or len(self.seen) < len(self.steps):
            raise DiffLensError(
                f"{self.site} was read at {len(self.seen)} of {len(self.steps)} steps: either the sampler leaves the "
                "schedule or the model does not run this module at all of them. Use sampler euler and a site that it "
                "runs."
            )
        return self.values


class Sampler(Protocol):
    """Draws pictures from noise with some network, wherever that runs.

    `networks.DenoiserSampler` is one for the avatars, `networks.DiffusersSampler` for diffusers, and ComfyUI's models
    have theirs in `nodes/host`. fingerprint: of the weights; progress: share of the sampling that lies behind each
    step; shape: of one picture's noise; info: what else decides the pictures, JSON-able.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def progress(self) -> tuple[float, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def info(self) -> Mapping[str, Any]: ...

    def owns(self, mark: str) -> bool:
        """Whether a `fingerprint` in a file is of these weights, also in another precision or by an earlier version."""
        ...

    def sample(self, noise: Tensor, images: Tensor, edits: Sequence[Edit] = (), kept: Sequence[Kept] = ()) -> Tensor:
        """The finished latents of pictures `images` (B, their numbers in the run) from `noise` (B x shape).

        edits change and `kept` keep what the positive conditioning draws; `kept` see it as it is before the edits.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B x H x W x 3 in [0, 1], on the CPU) of finished latents."""
        ...

    def predict(
        self, noise: Tensor, images: Tensor, site: str, steps: Sequence[int], on_prediction: OnPrediction
    ) -> None:
        """Sample as `sample` does, by Euler's method where there is a choice, and tell `on_prediction` of `steps`.

        The pictures can be differentiated by what `site` puts out for the positive conditioning.
        """
        ...


@contextmanager
def at_step(
    model: nn.Module,
    step: int,
    progress: float,
    images: Tensor,
    edits: Sequence[Edit],
    kept: Sequence[Kept],
    part: Whole | None = None,
) -> Iterator[None]:
    """While open, `kept` keep what their sites put out, and then the edits change what theirs do.

    part: see `edit_site`.
    """
    with ExitStack() as stack:
        for one in kept:

            def keep(h: Tensor, one: Kept = one) -> Tensor:
                one.keep(step, h)
                return h

            stack.enter_context(edit_site(model, one.site, keep, part))
        for edit in edits:
            stack.enter_context(edit_site(model, edit.site, partial(edit, progress=progress, images=images), part))
        yield


def noise_batches(shape: Sequence[int], count: int, seed: int, batch: int, twins: int = 1) -> Iterator[Tensor]:
    """The noise of pictures 0 .. count-1 of a run (each of `shape`), `batch` at a time, as if drawn at once.

    twins: so many pictures in turn have the same; count and batch are multiples of it.
    """
    if twins > 1:
        for noise in noise_batches(shape, count // twins, seed, batch // twins):
            yield noise.repeat_interleave(twins, dim=0)
        return
    generator = torch.Generator("cpu").manual_seed(seed)
    # torch draws in blocks of 16 numbers: only where a batch fills its last block do the next ones begin anew.
    piece = count if prod(shape) * batch % 16 or prod(shape) * count % 16 else batch
    for first in range(0, count, piece):
        yield from torch.randn(min(piece, count - first), *shape, generator=generator).split(batch)


def lacks_memory(error: Exception) -> bool:
    """Whether the error says that there was not enough memory."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


@dataclass
class Halving:
    """Draws batches in pieces of `at_once` pictures; where memory does not hold one, of half as many from then on.

    on_half is told how many then.
    """

    at_once: int
    on_half: Callable[[int], None]

    def __call__(self, draw: Callable[[Tensor], Drawn], images: Tensor) -> list[Drawn]:
        """draw(some of the images) for all of them in turn. Raises `DiffLensError` if there is no room for one."""
        found: list[Drawn] = []
        while len(images):
            some = images[: self.at_once]
            try:
                found.append(draw(some))
            except Exception as error:
                if not lacks_memory(error):
                    raise
                if len(some) == 1:
                    raise DiffLensError(
                        f"there is not enough memory to draw a single picture ({' '.join(str(error).split())[:200]}). "
                        "Draw smaller pictures, capture fewer sites, or close other programs."
                    ) from error
                self.at_once = (len(some) + 1) // 2
            else:
                images = images[len(some) :]
                continue
            gc.collect()  # the error is gone by now, and what was computed until then with it
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.on_half(self.at_once)
        return found


def capture(
    sampler: Sampler,
    count: int,
    seed: int,
    batch: int = 64,
    sites: Sequence[str] = ("middle_block",),
    span: tuple[float, float] = (0.0, 1.0),
    dtype: str = "float16",
    folder: str | Path | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
    most: int = 0,
    enough: Callable[[Tensor], bool] = lambda latents: True,
    cells: int = FINEST,
    room: Callable[[int], None] = lambda needed: None,
    on_half: Callable[[int], None] = lambda at_once: None,
    twins: int = 1,
) -> Store:
    """Sample `count` pictures, `batch` at once, keeping what `sites` put out at the steps whose progress is in `span`.

    Kept in memory or in `folder`, where a capture that was cut off is gone on with: see `record`. The store's samples
    are the finished latents. If `most` is more than `count`, it goes on until enough(finished latents), which is told
    of every batch in turn, or until so many are there. Of maps with more than `cells` positions, one in each of so many
    cells is kept (0: all are). room is told, once the first batch is there, how many bytes all that are to be drawn
    will take, and may raise. Where memory does not hold a batch, half as many pictures are sampled at once from then
    on, which on_half is told; the store's shards are as large as before.
    """
    steps = [step for step, progress in enumerate(sampler.progress) if span[0] <= progress <= span[1]]
    if not steps:
        raise DiffLensError(f"no step lies between {span[0]} and {span[1]} of the sampling. Widen the span.")
    progress = tuple(sampler.progress[step] for step in steps)
    mark = sampler.fingerprint
    if folder is not None and (Path(folder) / INDEX).exists() and sampler.owns(begun := read_index(Path(folder)).model):
        mark = begun
    count, most, batch = (-(-number // twins) * twins for number in (count, most, batch))
    info = dict(sampler.info) | ({MOST: most} if most > count else {}) | ({TWINS: twins} if twins > 1 else {})
    index = Index(tuple(sites), progress, max(count, most), min(batch, count), seed, mark, dtype, info, cells)
    drawn, asked, in_pieces = 0, False, Halving(batch, on_half)

    def is_enough(latents: Tensor) -> bool:
        nonlocal drawn
        drawn += len(latents)
        return enough(latents) and drawn >= count

    def draw_piece(first: int, noise: Tensor, images: Tensor) -> Shard:
        kept = [Kept(site, steps, DTYPES[dtype], cells, images, seed, twins) for site in sites]
        latents = sampler.sample(noise[images - first], images, kept=kept)
        sizes = {f"{one.site}{SIZE}": torch.tensor(one.size) for one in kept if one.size}
        return {one.site: one.taken() for one in kept} | sizes | {SAMPLES: latents.cpu()}

    def draw(first: int, noise: Tensor) -> Shard:
        nonlocal asked
        pieces = in_pieces(partial(draw_piece, first, noise), torch.arange(first, first + len(noise)))
        on_batch(first + len(noise))
        shard = joined(pieces, sites)
        if not asked:
            asked = True
            room(sum(tensor.nbytes for tensor in shard.values()) * max(0, count - first) // len(noise))
        return shard

    return record(index, noise_batches(sampler.shape, index.pictures, seed, batch, twins), draw, folder, is_enough)


def joined(pieces: Sequence[Shard], sites: Sequence[str]) -> Shard:
    """One shard of the pictures of all."""
    if len(pieces) == 1:
        return pieces[0]
    values = {site: torch.cat([piece[site] for piece in pieces], dim=1) for site in sites}
    return {**pieces[0], **values, SAMPLES: torch.cat([piece[SAMPLES] for piece in pieces])}


class Draw(Protocol):
    """How experiments draw pictures, whatever the host: from a fixed set of noises, in two goes.

    A card may not hold the networks of both at once, and then many latents should come before any picture.
    """

    def latents(self, edits: Sequence[Edit], which: Tensor) -> Tensor:
        """Finished latents, each from the noise of that number (B, int64); edits number those of the batch from 0."""
        ...

    def pictures(self, latents: Tensor) -> Tensor:
        """B x H x W x 3 in [0, 1], on the CPU."""
        ...
