"""Sampling networks of diffusers with diffusers' own schedulers, with edits and capture at their sites."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..activations import Edit, Kept, Leaf, OnPrediction, at_step, differentiable, draw_held, holds
from ..files import DiffLensError, digest, fingerprint, made_by, sums_mark

if TYPE_CHECKING:  # sampling needs nothing of diffusers but what it is given
    from diffusers.models.modeling_utils import ModelMixin

STEP_SEEDS = 2**62  # far from the seeds that users choose, which draw the starting noise


@dataclass(frozen=True)
class DiffusersSampler:
    """A network of diffusers as a `Sampler`: a UNet2DModel, a UNet2DConditionModel, or one that is called alike.

    scheduler: any of diffusers' schedulers; what it adds of noise is drawn for each picture by `seed` and the picture's
    number. positive: the network's further arguments, such as encoder_hidden_states, whose tensors have one row for all
    pictures or one for each; negative: the same of what to guide away from, by `cfg` (Ho & Salimans 2022). vae: an
    AutoencoderKL, None for a network on pixels.
    """

    network: ModelMixin
    scheduler: Any
    steps: int = 20
    positive: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Mapping[str, Tensor] | None = None
    cfg: float = 1.0
    vae: ModelMixin | None = None
    seed: int = 0

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.network.state_dict())

    def owns(self, mark: str) -> bool:
        return made_by(mark, self.network.state_dict())

    @property
    def progress(self) -> tuple[float, ...]:
        last = self.scheduler.config.num_train_timesteps - 1
        return tuple(max(0.0, 1 - float(timestep) / last) for timestep in self.started().timesteps)

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def info(self) -> dict[str, Any]:
        sampler = digest(type(self.scheduler).__name__, repr(sorted(self.scheduler.config.items())))
        prompts = sums_mark({**self.positive, **{f"negative {key}": t for key, t in (self.negative or {}).items()}})
        return {"steps": self.steps, "sampler": sampler, "prompts": prompts, "cfg": self.cfg, "noise": self.seed}

    def started(self) -> Any:
        """A scheduler of its own for every run, because it counts steps."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps, device=self.network.device)
        return scheduler

    @torch.inference_mode()
    def sample(self, noise: Tensor, images: Tensor, edits: Sequence[Edit] = (), kept: Sequence[Kept] = ()) -> Tensor:
        """See `Sampler.sample`."""

        def draw(edits: Sequence[Edit]) -> Tensor:
            return self.run(noise, images, edits, kept)

        return draw_held(draw, edits) if any(map(holds, edits)) else draw(edits)

    def run(
        self,
        noise: Tensor,
        images: Tensor,
        edits: Sequence[Edit],
        kept: Sequence[Kept] = (),
        on_step: Callable[[int, Any], None] = lambda step, out: None,
    ) -> Tensor:
        """The scheduler's steps; on_step is told what it puts out, and what follows is not differentiated through that.

        Else as `Sampler.sample`.
        """
        scheduler, settings = self.started(), {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            seeds = [(self.seed + STEP_SEEDS + int(image)) % 2**63 for image in images]
            settings["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = noise.to(self.network.device, self.network.dtype) * scheduler.init_noise_sigma
        for step, (timestep, progress) in enumerate(zip(scheduler.timesteps, self.progress, strict=True)):
            scaled = scheduler.scale_model_input(x, timestep)
            with at_step(self.network, step, progress, images, edits, kept):
                out = self.network(scaled, timestep, **rows_of(self.positive, images, x)).sample
            if self.negative is not None and self.cfg != 1:
                away = self.network(scaled, timestep, **rows_of(self.negative, images, x)).sample
                out = torch.lerp(away, out, self.cfg)
            result = scheduler.step(out, timestep, x, **settings)
            on_step(step, result)
            x = result.prev_sample.detach()
        return x

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Sampler.decode`."""
        return self.pictures(latents).cpu()

    def pictures(self, latents: Tensor) -> Tensor:
        """B x H x W x 3 in [0, 1], where the network is."""
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            latents = self.vae.decode(latents).sample
        return (latents.float().movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    def predict(
        self, noise: Tensor, images: Tensor, site: str, steps: Sequence[int], on_prediction: OnPrediction
    ) -> None:
        """See `Sampler.predict`. Raises `DiffLensError` if the scheduler does not tell what it predicts."""
        leaf = Leaf(site)

        def tell(step: int, result: Any) -> None:
            if step not in steps or leaf.h is None:
                return
            if (x0 := getattr(result, "pred_original_sample", None)) is None:
                raise DiffLensError(
                    f"{type(self.scheduler).__name__} does not tell which picture it predicts on the way. Use a "
                    "scheduler that does, such as DDIMScheduler or EulerDiscreteScheduler."
                )
            on_prediction(step, leaf.h, self.pictures(x0))

        with differentiable(*filter(None, (self.network, self.vae))):
            self.run(noise.clone(), images, [leaf], on_step=tell)


def rows_of(given: Mapping[str, Tensor], images: Tensor, like: Tensor) -> dict[str, Tensor]:
    """Of every tensor the rows of those pictures, or its only row for each of them, on the device of `like`."""
    which = images.to(like.device)
    return {name: t.to(like.device)[which if len(t) > 1 else torch.zeros_like(which)] for name, t in given.items()}
