"""DDIM's noise levels, and the reference's way to sample."""

from __future__ import annotations

import functools

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflens_core.networks import ddim_step, ddim_timesteps
from .edits import UNEDITED


def ddim_sigmas(model: ModelPatcher, steps: int, spacing: str) -> Tensor:
    """SIGMAS (steps + 1, the last 0) of the timesteps that DDIM takes."""
    sigmas = model.get_model_object("model_sampling").sigmas.cpu()
    return torch.cat([sigmas[ddim_timesteps(len(sigmas), steps, spacing)], torch.zeros(1)])


def reference_sampler(eta: float) -> comfy.samplers.Sampler:
    """A SAMPLER as the reference DiffLens samples: DDIM with noise, two evaluations of the model a step.

    The picture to move to comes from the edited model, the direction back to the noise from the unedited one. The first
    and the last step are left unedited. Noise is drawn for each picture by the seed plus its place in the batch.
    """
    return comfy.samplers.KSAMPLER(functools.partial(sample_two_passes, eta=eta))


PICTURE_SEEDS = 2**62  # far from the seeds that users choose, which draw the starting noise


@torch.no_grad()
def sample_two_passes(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0):
    sampling = model.inner_model.inner_model.model_sampling
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    levels = [(1 - sigma if flow else 1.0, sigma) for sigma in sigmas.tolist()]
    options = extra_args["model_options"]
    unedited = options | {"transformer_options": options.get("transformer_options", {}) | {UNEDITED: True}}
    seed = (extra_args.get("seed") or 0) + PICTURE_SEEDS
    generators = [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(len(x))]
    last = len(levels) - 2
    for step, (now, then) in enumerate(zip(levels, levels[1:], strict=False)):
        sigma = sigmas[step] * x.new_ones(len(x))
        plain = model(x, sigma, **(extra_args | {"model_options": unedited}))
        clean = model(x, sigma, **extra_args) if 0 < step < last else plain
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": clean})
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
        x = ddim_step(x, clean, plain, now, then, eta, noise.to(x))
    return x
