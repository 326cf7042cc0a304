"""Sampling the avatars' denoiser without a host, with edits and capture at its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..activations import Edit, Kept, Leaf, OnPrediction, at_step, differentiable, draw_held, holds
from ..files import fingerprint, made_by, sums_mark
from .denoiser import Denoiser


def start_noise(count: int, seed: int, height: int = 64, width: int = 0) -> Tensor:
    """Noise of pictures 0 .. count-1 of a run (count x 3 x height x width), the same as a host draws for `seed`.

    width: that of a square if 0.
    """
    return torch.randn(count, 3, height, width or height, generator=torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): x0 = x0(empty) + cfg (x0(context) - x0(empty)).

    context: P x T x D of prompts, or those of the pictures at hand; empty: 1 x T x D of no prompt.
    """

    context: Tensor
    empty: Tensor
    cfg: float = 1.0

    def of(self, images: Tensor) -> Guidance:
        """Guidance of those pictures (B, their numbers): picture i is of prompt i modulo the number of prompts."""
        return replace(self, context=self.context[images % len(self.context)])


@torch.inference_mode()
def sample(
    model: Denoiser,
    noise: Tensor,
    steps: int = 20,
    edits: Sequence[Edit] = (),
    images: Tensor | None = None,
    guidance: Guidance | None = None,
    kept: Sequence[Kept] = (),
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Pictures (B x 3 x H x W, in [-1, 1]) by `euler`, whose arguments it takes; edits that hold do."""

    def draw(edits: Sequence[Edit]) -> Tensor:
        return euler(model, noise, steps, edits, images, guidance, kept, on_step).clamp(-1, 1)

    return draw_held(draw, edits) if any(map(holds, edits)) else draw(edits)


def euler(
    model: Denoiser,
    noise: Tensor,
    steps: int,
    edits: Sequence[Edit],
    images: Tensor | None,
    guidance: Guidance | None,
    kept: Sequence[Kept] = (),
    on_step: Callable[[int], None] = lambda step: None,
    on_prediction: Callable[[int, Tensor], None] = lambda step, x0: None,
) -> Tensor:
    """Euler sampling of the rectified-flow ODE from sigma 1 to 0 in equal steps.

    noise: B x 3 x H x W; images: B, the pictures' numbers, from 0 if not given. Under guidance edits and `kept` see
    what the prompt draws, never the unconditional half. on_prediction is told the clean pictures (B x 3 x H x W) that a
    step predicts; what follows is not differentiated through them.
    """
    x, images = noise, torch.arange(len(noise)) if images is None else images
    sigmas = torch.linspace(1, 0, steps + 1)

    def context(of: Tensor | None) -> Tensor | None:
        return None if of is None else of.expand(len(noise), -1, -1)

    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        level = sigma.expand(len(x))
        with at_step(model, i, 1 - float(sigma), images, edits, kept):
            x0 = model(x, level, context(guidance.context if guidance else None))
        if guidance and guidance.cfg != 1:
            x0 = torch.lerp(model(x, level, context(guidance.empty)), x0, guidance.cfg)
        on_prediction(i, x0)
        x0 = x0.detach()
        x = x0 + (x - x0) * (following / sigma)
        on_step(i + 1)
    return x


@dataclass(frozen=True)
class DenoiserSampler:
    """The avatars' denoiser as a `Sampler`; under guidance picture i has row i of the context, modulo their number.

    size: height and width of the pictures, the model's own if not given.
    """

    model: Denoiser
    steps: int = 20
    guidance: Guidance | None = None
    size: tuple[int, int] | None = None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model.state_dict())

    def owns(self, mark: str) -> bool:
        return made_by(mark, self.model.state_dict())

    @property
    def progress(self) -> tuple[float, ...]:
        return tuple((torch.arange(self.steps) / self.steps).tolist())

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, *(self.size or (self.model.config.size, self.model.config.size)))

    @property
    def info(self) -> dict[str, Any]:
        if not self.guidance:
            return {}
        prompts = {"context": self.guidance.context, "empty": self.guidance.empty}
        return {"prompts": sums_mark(prompts), "cfg": self.guidance.cfg}

    def sample(self, noise: Tensor, images: Tensor, edits: Sequence[Edit] = (), kept: Sequence[Kept] = ()) -> Tensor:
        """See `Sampler.sample`; the latents are pictures in [-1, 1]."""
        guidance = self.guidance and self.guidance.of(images)
        return sample(self.model, noise, self.steps, edits, guidance=guidance, kept=kept, images=images)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Sampler.decode`."""
        return latents.movedim(1, -1) / 2 + 0.5

    def predict(
        self, noise: Tensor, images: Tensor, site: str, steps: Sequence[int], on_prediction: OnPrediction
    ) -> None:
        """See `Sampler.predict`."""
        leaf = Leaf(site)

        def tell(step: int, x0: Tensor) -> None:
            if step in steps and leaf.h is not None:
                on_prediction(step, leaf.h, self.decode(x0).clamp(0, 1))

        with differentiable(self.model):
            guidance = self.guidance and self.guidance.of(images)
            euler(self.model, noise.clone(), self.steps, [leaf], images, guidance, on_prediction=tell)
