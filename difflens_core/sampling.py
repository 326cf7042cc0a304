"""Sampling the avatars' denoiser without a host, with edits and capture at its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .activations import capture_site, edit_site
from .denoiser import Denoiser, fingerprint
from .store import DTYPES, SAMPLES, Index, Shard, Store, record


class Edit(Protocol):
    """Something that edits what module `site` puts out, such as `Steering`."""

    @property
    def site(self) -> str: ...

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        """h' for h (B x C x H x W); progress: 0 to 1; images: B, numbers of the pictures, on the CPU."""


# Pictures (B x H x W x 3 in [0, 1], on the CPU), each from the noise of that number (B, int64) in a fixed set, under
# edits that number the pictures of the batch from 0. How experiments sample, whatever the host.
Draw = Callable[[Sequence[Edit], Tensor], Tensor]


def start_noise(count: int, seed: int, size: int = 64) -> Tensor:
    """Noise of pictures 0 .. count-1 of a run (count x 3 x size x size), the same as a host draws for `seed`."""
    return torch.randn(count, 3, size, size, generator=torch.Generator("cpu").manual_seed(seed))


def noise_batches(shape: Sequence[int], count: int, seed: int, batch: int) -> Iterator[Tensor]:
    """The noise of pictures 0 .. count-1 of a run (each of `shape`), `batch` at a time, as if drawn at once."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # torch draws in blocks of 16 numbers: only where a batch fills its last block do the next ones begin anew.
    piece = count if prod(shape) * batch % 16 or prod(shape) * count % 16 else batch
    for first in range(0, count, piece):
        yield from torch.randn(min(piece, count - first), *shape, generator=generator).split(batch)


@torch.inference_mode()
def sample(
    model: Denoiser,
    noise: Tensor,
    steps: int = 20,
    steerings: Sequence[Edit] = (),
    first_image: int = 0,
    capture: str | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, list[Tensor]]:
    """Euler sampling of the rectified-flow ODE from sigma 1 to 0 in equal steps.

    noise: B x 3 x H x W; pictures are numbered from `first_image`. Returns pictures (B x 3 x H x W, in [-1, 1])
    and, if `capture` names a site, its output at every step (list of B x C x H x W in fp16).
    """
    x, images = noise, torch.arange(first_image, first_image + len(noise))
    sigmas = torch.linspace(1, 0, steps + 1)
    with ExitStack() as stack:
        captured = stack.enter_context(capture_site(model, capture)) if capture else []
        for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            progress = 1 - float(sigma)
            with ExitStack() as edits:
                for steering in steerings:
                    edits.enter_context(
                        edit_site(model, steering.site, lambda h, s=steering, p=progress: s(h, p, images))
                    )
                x0 = model(x, sigma.expand(len(x)))
            x = x0 + (x - x0) * (following / sigma)
            on_step(i + 1)
    return x.clamp(-1, 1), captured


def capture_pictures(
    model: Denoiser,
    count: int,
    seed: int,
    steps: int = 20,
    batch: int = 64,
    sites: Sequence[str] = ("middle_block",),
    dtype: str = "float16",
    folder: str | Path | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Store:
    """Sample `count` pictures, `batch` at once, keeping what `sites` put out at every step: see `record`.

    The store's samples are the pictures, count x 3 x H x W in [-1, 1].
    """
    progress = tuple((torch.arange(steps) / steps).tolist())
    index = Index(tuple(sites), progress, count, batch, seed, fingerprint(model.state_dict()), dtype)

    def draw(first: int, noise: Tensor) -> Shard:
        with ExitStack() as stack:
            outputs = {site: stack.enter_context(capture_site(model, site, DTYPES[dtype])) for site in sites}
            pictures, _ = sample(model, noise, steps, first_image=first)
        on_batch(first + len(noise))
        kept = {site: torch.stack([h.movedim(1, -1) for h in values]) for site, values in outputs.items()}
        return kept | {SAMPLES: pictures}

    size = model.config.size
    return record(index, noise_batches((3, size, size), count, seed, batch), draw, folder)


def drawer(model: Denoiser, noise: Tensor, steps: int = 20) -> Draw:
    """`Draw` for the avatars' denoiser and a fixed set of noises (n x 3 x H x W)."""
    return lambda edits, which: sample(model, noise[which], steps, edits)[0].movedim(1, -1) / 2 + 0.5
