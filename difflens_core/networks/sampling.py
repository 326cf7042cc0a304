"""Sampling the avatars' denoiser without a host, with edits and capture at its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..activations import DTYPES, SAMPLES, Draw, Edit, Index, Kept, Shard, Store, edit_site, noise_batches, record
from ..files import fingerprint
from .denoiser import Denoiser


def start_noise(count: int, seed: int, size: int = 64) -> Tensor:
    """Noise of pictures 0 .. count-1 of a run (count x 3 x size x size), the same as a host draws for `seed`."""
    return torch.randn(count, 3, size, size, generator=torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): x0 = x0(empty) + cfg (x0(context) - x0(empty)).

    context: B x T x D of the pictures' prompts, or 1 x T x D if all have the same; empty: 1 x T x D of no prompt.
    """

    context: Tensor
    empty: Tensor
    cfg: float = 1.0

    def of(self, pictures: slice | Tensor) -> Guidance:
        """Guidance of some of the pictures."""
        return self if len(self.context) == 1 else replace(self, context=self.context[pictures])


@torch.inference_mode()
def sample(
    model: Denoiser,
    noise: Tensor,
    steps: int = 20,
    edits: Sequence[Edit] = (),
    first_image: int = 0,
    guidance: Guidance | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Euler sampling of the rectified-flow ODE from sigma 1 to 0 in equal steps.

    noise: B x 3 x H x W; pictures are numbered from `first_image`. Under guidance the edits see and change what the
    prompt draws, never the unconditional half. Returns pictures (B x 3 x H x W, in [-1, 1]).
    """
    x, images = noise, torch.arange(first_image, first_image + len(noise))
    sigmas = torch.linspace(1, 0, steps + 1)

    def context(of: Tensor | None) -> Tensor | None:
        return None if of is None else of.expand(len(noise), -1, -1)

    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        progress, level = 1 - float(sigma), sigma.expand(len(x))
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit_site(model, edit.site, lambda h, e=edit, p=progress: e(h, p, images)))
            x0 = model(x, level, context(guidance and guidance.context))
        if guidance and guidance.cfg != 1:
            x0 = torch.lerp(model(x, level, context(guidance.empty)), x0, guidance.cfg)
        x = x0 + (x - x0) * (following / sigma)
        on_step(i + 1)
    return x.clamp(-1, 1)


def capture_pictures(
    model: Denoiser,
    count: int,
    seed: int,
    steps: int = 20,
    batch: int = 64,
    sites: Sequence[str] = ("middle_block",),
    dtype: str = "float16",
    folder: str | Path | None = None,
    guidance: Guidance | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Store:
    """Sample `count` pictures, `batch` at once, keeping what `sites` put out at every step: see `record`.

    The store's samples are the pictures, count x 3 x H x W in [-1, 1]. Under guidance the prompts' half is kept.
    """
    progress = tuple((torch.arange(steps) / steps).tolist())
    info = {}
    if guidance:
        info = {"prompts": fingerprint({"context": guidance.context, "empty": guidance.empty}), "cfg": guidance.cfg}
    index = Index(tuple(sites), progress, count, batch, seed, fingerprint(model.state_dict()), dtype, info)

    def draw(first: int, noise: Tensor) -> Shard:
        kept = [Kept(site, DTYPES[dtype]) for site in sites]
        own = guidance and guidance.of(slice(first, first + len(noise)))
        pictures = sample(model, noise, steps, kept, first, own)
        on_batch(first + len(noise))
        return {k.site: torch.stack([h.movedim(1, -1) for h in k.outputs]) for k in kept} | {SAMPLES: pictures}

    size = model.config.size
    return record(index, noise_batches((3, size, size), count, seed, batch), draw, folder)


def drawer(model: Denoiser, noise: Tensor, steps: int = 20, guidance: Guidance | None = None) -> Draw:
    """`Draw` for the avatars' denoiser and a fixed set of noises (n x 3 x H x W)."""

    def draw(edits: Sequence[Edit], which: Tensor) -> Tensor:
        own = guidance and guidance.of(which)
        return sample(model, noise[which], steps, edits, guidance=own).movedim(1, -1) / 2 + 0.5

    return draw
