"""Noise schedules of discrete diffusion models, the timesteps that DDIM takes, and its step.

A picture at timestep t is x_t = signal x0 + noise_level noise. For a list of betas the variance-preserving form has
signal = sqrt(a_t) and noise_level = sqrt(1 - a_t), a_t being the product of 1 - beta up to t (Ho et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import DiffLensError

MOST_TIMESTEPS = 100_000
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("ddim", "leading", "trailing")


@dataclass(frozen=True)
class Schedule:
    """How a network was trained: betas (T, float64), what it predicts (of PREDICTIONS), and the largest absolute value
    to which a predicted clean picture is clipped (None: not at all)."""

    betas: Tensor
    prediction: str = "epsilon"
    clip: float | None = 1.0


def linear_betas(timesteps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Betas (timesteps, float64) in equal steps: the schedule of DDPM, guided-diffusion and P2."""
    return torch.linspace(first, last, timesteps, dtype=torch.float64)


def cosine_betas(timesteps: int = 1000) -> Tensor:
    """Betas (timesteps, float64) of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), at most 0.999."""
    angle = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2
    signal = angle.cos() ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


# diffusers' schedulers of models that were trained on a list of betas. They differ in the steps they take while
# sampling, which ComfyUI's samplers take here. Unless they are told otherwise, those in CLIPPING clip the clean
# picture, and those in FLAT have the betas of Stable Diffusion.
CLIPPING = ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel")
FLAT = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
SCHEDULERS = (
    *CLIPPING, *FLAT, "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "DEISMultistep",
    "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep",
)  # fmt: skip
# Their options that are read here, or that only say how they sample.
OPTIONS = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "clip_sample",
    "clip_sample_range", "algorithm_type", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "noise_sampler_seed", "predict_x0", "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "solver_order",
    "solver_p", "solver_type", "steps_offset", "tensor_format", "time_shift_type", "timestep_spacing", "timestep_type",
    "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip


def read_scheduler(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a diffusers scheduler_config.json describes. Raises `DiffLensError` if it is of another kind.

    Keys that are absent have the defaults of diffusers.
    """
    name = str(config.get("_class_name") or "DDPMScheduler").removesuffix("Scheduler")
    if "beta_schedule" not in config and "num_train_timesteps" not in config:
        kind = config.get("_class_name", "without a name")
        raise DiffLensError(f"the scheduler ({kind}) has no betas. Expected that of a DDPM or DDIM model.")
    if name not in SCHEDULERS:
        raise DiffLensError(
            f"its scheduler is a {config['_class_name']}, which is not supported. Known are those of models with a "
            f"list of betas: {', '.join(SCHEDULERS)}."
        )
    for option, value in config.items():
        if value and option not in OPTIONS and not option.startswith("_"):
            raise DiffLensError(f"the scheduler asks for {option} ({value}), which is not supported.")
    if config.get("timestep_type", "discrete") != "discrete":
        raise DiffLensError(f"the scheduler's timestep_type {config['timestep_type']} is not supported, only discrete.")
    kind, timesteps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS:
        raise DiffLensError(f"the scheduler has {timesteps!r} timesteps, expected 1 to {MOST_TIMESTEPS}.")
    default = (8.5e-4, 0.012) if name in FLAT else (1e-4, 0.02)
    first, last = config.get("beta_start", default[0]), config.get("beta_end", default[1])
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = linear_betas(timesteps, first, last)
    elif kind == "scaled_linear":
        betas = linear_betas(timesteps, first**0.5, last**0.5) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(timesteps)
    elif kind == "sigmoid":
        betas = torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (last - first) + first
    else:
        raise DiffLensError(f"the scheduler's beta_schedule {kind} is not known. Known are linear, scaled_linear, "
                            "squaredcos_cap_v2 and sigmoid.")  # fmt: skip
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas <= 1)).all():
        raise DiffLensError("the scheduler's betas are not all from 0 to 1. Its configuration is damaged.")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise DiffLensError(f"the scheduler's prediction_type {prediction} is none of {', '.join(PREDICTIONS)}.")
    clips = config.get("clip_sample", name in CLIPPING)
    clip = float(config.get("clip_sample_range", 1.0)) if clips else None
    if clip is not None and not 0 < clip < math.inf:
        raise DiffLensError(f"the scheduler clips at {clip}, expected a positive number. Its configuration is damaged.")
    return Schedule(betas, prediction, clip)


def ddim_timesteps(timesteps: int, steps: int, spacing: str = "ddim") -> list[int]:
    """`steps` of the timesteps 0 .. timesteps-1, descending.

    spacing: "ddim", as guided-diffusion's ddimN (every k-th from 0, for the smallest k that gives N); "leading" or
    "trailing", as diffusers' schedulers. Raises `DiffLensError` if there is no such choice.
    """
    if not 1 <= steps <= timesteps:
        raise DiffLensError(f"{steps} steps cannot be taken of a model's {timesteps} timesteps.")
    if spacing == "leading":
        return [step * (timesteps // steps) for step in reversed(range(steps))]
    if spacing == "trailing":
        return (np.arange(timesteps, 0, -timesteps / steps).round().astype(int) - 1).tolist()
    possible = {len(range(0, timesteps, stride)): stride for stride in reversed(range(1, timesteps + 1))}
    if steps not in possible:
        below, above = max(n for n in possible if n < steps), min(n for n in possible if n > steps)
        raise DiffLensError(
            f"spacing ddim cannot take {steps} of {timesteps} timesteps in equal strides. Use {below} or {above} "
            "steps, or spacing leading."
        )
    return list(range(0, timesteps, possible[steps]))[::-1]


def ddim_step(
    x: Tensor, clean: Tensor, unedited: Tensor, now: tuple[float, float], then: tuple[float, float], eta: float,
    noise: Tensor,
) -> Tensor:  # fmt: skip
    """x at the next noise level (Song et al. 2021, eq. 12 and 16).

    x, clean, unedited, noise: alike. `clean` is the picture to move to; the direction back towards x is that of the
    prediction `unedited`, which may be another one (Kwon et al. 2023, "asymmetric reverse process").
    now, then: (signal, noise level) of x and of the result. eta: 0 adds no noise, 1 as much as DDPM.
    """
    (signal, level), (next_signal, next_level) = now, then
    direction = (x - signal * unedited) / level
    kept = next_level * signal / (level * next_signal)  # share of the next noise level that x's own noise can be
    fresh = eta * next_level * math.sqrt(1 - kept**2)
    return next_signal * clean + math.sqrt(next_level**2 - fresh**2) * direction + fresh * noise
