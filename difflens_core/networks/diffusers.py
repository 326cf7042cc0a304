"""Sampling networks of diffusers with diffusers' own schedulers, with edits and capture at their sites."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import (
    Edit,
    Kept,
    Leaf,
    OnPrediction,
    Whole,
    at_step,
    differentiable,
    draw_held,
    from_map,
    holds,
    to_map,
)
from ..files import DiffLensError, digest, fingerprint, made_by, sums_mark

if TYPE_CHECKING:  # sampling needs nothing of diffusers but what it is given
    from diffusers.models.modeling_utils import ModelMixin

STEP_SEEDS = 2**62  # far from the seeds that users choose, which draw the starting noise
Arguments = Mapping[str, Any]  # further arguments of a network by name: tensors, or such arguments again


@dataclass(frozen=True)
class DiffusersSampler:
    """A network of diffusers as a `Sampler`: a UNet2DModel, a UNet2DConditionModel, or one that is called alike.

    scheduler: any of diffusers' schedulers; what it adds of noise is drawn for each picture by `seed` and the picture's
    number. positive: the network's further arguments, such as encoder_hidden_states, whose tensors have a row for each
    prompt: picture i is of prompt i modulo their number; negative: the same of what to guide away from, by `cfg`
    (Ho & Salimans 2022). vae: an AutoencoderKL, None for a network on pixels. size: height and width of the latents,
    the network's own if None.
    """

    network: ModelMixin
    scheduler: Any
    steps: int = 20
    positive: Arguments = field(default_factory=dict)
    negative: Arguments | None = None
    cfg: float = 1.0
    vae: ModelMixin | None = None
    seed: int = 0
    size: tuple[int, int] | None = None

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
        size = self.size or self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def info(self) -> dict[str, Any]:
        sampler = digest(type(self.scheduler).__name__, repr(sorted(self.scheduler.config.items())))
        prompts = sums_mark(flat(self.positive) | flat(self.negative or {}, "negative "))
        return {"steps": self.steps, "sampler": sampler, "prompts": prompts, "cfg": self.cfg, "noise": self.seed}

    def started(self) -> Any:
        """A scheduler of its own for every run, because it counts steps."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps, device=self.network.device)
        return scheduler

    def evaluate(self, x: Tensor, timestep: Tensor, given: Arguments) -> Tensor:
        """What the network puts out for latents x (B x C x H x W) at a timestep (B)."""
        return self.network(x, timestep=timestep, **given).sample

    def part(self, x: Tensor) -> Whole | None:
        """What of the network's blocks is the picture's, for latents x: see `edit_site`."""
        return None

    def predicted(self, scheduler: Any, step: int, x: Tensor, out: Tensor, result: Any) -> Tensor | None:
        """The finished latents that a step predicts; None if the scheduler does not tell."""
        return getattr(result, "pred_original_sample", None)

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
        on_step: Callable[[int, Tensor | None], None] = lambda step, predicted: None,
    ) -> Tensor:
        """The scheduler's steps; on_step is told what each has `predicted`, and what follows is not differentiated.

        Else as `Sampler.sample`.
        """
        scheduler, settings = self.started(), {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            seeds = [(self.seed + STEP_SEEDS + int(image)) % 2**63 for image in images]
            settings["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = noise.to(self.network.device, self.network.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda x, timestep: x)  # those of rectified flow have neither
        for step, (timestep, progress) in enumerate(zip(scheduler.timesteps, self.progress, strict=True)):
            scaled, level = scale(x, timestep), timestep.to(x.device).expand(len(x))
            with at_step(self.network, step, progress, images, edits, kept, self.part(x)):
                out = self.evaluate(scaled, level, rows_of(self.positive, images, x))
            if self.negative is not None and self.cfg != 1:
                out = torch.lerp(self.evaluate(scaled, level, rows_of(self.negative, images, x)), out, self.cfg)
            result = scheduler.step(out, timestep, x, **settings)
            on_step(step, self.predicted(scheduler, step, x, out, result))
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

        def tell(step: int, x0: Tensor | None) -> None:
            if step not in steps or leaf.h is None:
                return
            if x0 is None:
                raise DiffLensError(
                    f"{type(self.scheduler).__name__} does not tell which picture it predicts on the way. Use a "
                    "scheduler that does, such as DDIMScheduler or EulerDiscreteScheduler."
                )
            on_prediction(step, leaf.h, self.pictures(x0))

        with differentiable(*filter(None, (self.network, self.vae))):
            self.run(noise.clone(), images, [leaf], on_step=tell)


class FlowSampler(DiffusersSampler):
    """A transformer of rectified flow: SD3Transformer2DModel, FluxTransformer2DModel, or one that is called alike.

    Its blocks hand on the tokens of the text and of the picture. Sites are whole blocks, such as transformer_blocks.5,
    and show the picture's as a map. Of Flux, `positive` may have the distilled `guidance` (one row).
    """

    @property
    def packed(self) -> bool:
        """Whether the network takes tokens of 2 x 2 latents and their places, as Flux does, instead of a map."""
        return "img_ids" in inspect.signature(self.network.forward).parameters

    @property
    def patch(self) -> int:
        """Height and width of a token, in latents."""
        return 2 if self.packed else self.network.config.patch_size

    @property
    def shape(self) -> tuple[int, ...]:
        channels = self.network.config.in_channels // (4 if self.packed else 1)
        if self.size is None and self.packed:
            raise DiffLensError("Flux has no size of its own. Give one, such as 128 x 128 latents for 1024 pixels.")
        size = self.size or (self.network.config.sample_size,) * 2
        return (channels, *size)

    def started(self) -> Any:
        """The schedule that diffusers' pipelines take: larger pictures are noised for longer, if the model asks for it.

        Flux's begins at noise and ends one step before the picture, in equal steps before that shift.
        """
        scheduler = copy.deepcopy(self.scheduler)
        settings: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            settings["mu"] = shift_of(self.shape[1] * self.shape[2] // self.patch**2, scheduler.config)
        if self.packed:
            settings["sigmas"] = np.linspace(1.0, 1 / self.steps, self.steps)
        else:
            settings["num_inference_steps"] = self.steps
        scheduler.set_timesteps(**settings, device=self.network.device)
        return scheduler

    def evaluate(self, x: Tensor, timestep: Tensor, given: Arguments) -> Tensor:
        if not self.packed:
            return super().evaluate(x, timestep, given)
        height, width = (side // 2 for side in x.shape[2:])
        y, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(y), y, across], dim=2).flatten(0, 1).to(x)
        text = torch.zeros(given["encoder_hidden_states"].shape[1], 3).to(x)
        tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        out = self.network(tokens, timestep=timestep / 1000, img_ids=places, txt_ids=text, **given).sample
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), 2)

    def part(self, x: Tensor) -> Whole:
        return PictureTokens((x.shape[2] // self.patch, x.shape[3] // self.patch))

    def predicted(self, scheduler: Any, step: int, x: Tensor, out: Tensor, result: Any) -> Tensor:
        return x - scheduler.sigmas[step].to(x) * out


class PictureTokens(Whole):
    """The picture's tokens of what a block takes and gives, as a map of `grid`; blocks give (text, picture)."""

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid

    def given(self, args: tuple, kwargs: dict) -> Tensor:
        return self.map_of(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def read(self, output: Any, kwargs: dict) -> Tensor:
        return self.map_of(output[1] if isinstance(output, tuple) else output)

    def write(self, output: Any, kwargs: dict, h: Tensor) -> Any:
        if isinstance(output, tuple):
            return (output[0], from_map(h, 3), *output[2:])
        return from_map(h, output.ndim)

    def map_of(self, found: Any) -> Any:
        if isinstance(found, Tensor) and found.ndim == 3 and found.shape[1] != math.prod(self.grid):
            raise DiffLensError(
                f"this site has {found.shape[1]} tokens, the picture has {math.prod(self.grid)}, and which of them are "
                "the picture's is not known. Use a whole block, such as transformer_blocks.5."
            )
        return to_map(found, self.grid)


def shift_of(tokens: int, config: Mapping[str, Any]) -> float:
    """mu of a schedule for pictures of so many tokens: a line through two sizes (Esser et al. 2024, section 5.3.2)."""
    sizes = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return shifts[0] + (shifts[1] - shifts[0]) * (tokens - sizes[0]) / (sizes[1] - sizes[0])


def rows_of(given: Arguments, images: Tensor, like: Tensor) -> dict[str, Any]:
    """Of every tensor, which has a row for each prompt, the rows of those pictures, on the device of `like`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            found[name] = value[(images % len(value)).to(value.device)].to(like.device)
        else:
            found[name] = rows_of(value, images, like)
    return found


def flat(given: Arguments, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of arguments by their whole name."""
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        found |= {prefix + name: value} if isinstance(value, Tensor) else flat(value, f"{prefix}{name} ")
    return found
