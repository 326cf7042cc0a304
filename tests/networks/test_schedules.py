"""Betas, DDIM's timesteps and its step, against diffusers' schedulers."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from difflens_core.files import DiffLensError
from difflens_core.networks import ddim_step, ddim_timesteps
from difflens_core.networks.schedules import SCHEDULERS, cosine_betas, linear_betas, read_scheduler


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_train_timesteps": 250, "beta_start": 0.001, "beta_end": 0.03},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample_range": 2.0},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    ],
)
def test_a_scheduler_is_read_as_diffusers_reads_it(settings):
    scheduler = DDPMScheduler(**settings)
    found, config = read_scheduler(dict(scheduler.config)), scheduler.config
    torch.testing.assert_close(found.betas.float(), scheduler.betas, atol=2e-7, rtol=2e-5)
    assert found.prediction == config.prediction_type
    assert found.clip == (config.clip_sample_range if config.clip_sample else None)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_known_scheduler_is_read_with_its_own_defaults(name):
    try:
        scheduler = getattr(diffusers, f"{name}Scheduler")(beta_schedule="linear")
    except ImportError as error:  # one of them needs torchsde
        pytest.skip(str(error))
    short = {"beta_schedule": "linear", "_class_name": f"{name}Scheduler"}
    for config in (short, short | dict(scheduler.config)):
        found = read_scheduler(config)
        torch.testing.assert_close(found.betas.float(), scheduler.betas, atol=2e-7, rtol=2e-5)
        assert found.clip == (scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler. has no betas. Expected that of a DDPM or DDIM"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
            "is a FlowMatchEulerDiscreteSc",
        ),
        ({"_class_name": "LCMScheduler", "beta_schedule": "linear"}, "scheduler is a LCMScheduler, which is not supp"),
        (
            {"_class_name": "MyScheduler", "beta_schedule": "linear"},
            "scheduler is a MyScheduler, which is not supported",
        ),
        ({"beta_schedule": "linear", "use_flow_sigmas": True}, "asks for use_flow_sigmas .True."),
        ({"beta_schedule": "linear", "snr_shift_scale": 3.0}, "asks for snr_shift_scale .3.0."),
        ({"beta_schedule": "linear", "timestep_type": "continuous"}, "timestep_type continuous is not supported"),
        ({"beta_schedule": "cubic"}, "beta_schedule cubic is not known"),
        ({"beta_schedule": "linear", "prediction_type": "flow"}, "prediction_type flow is none of epsilon"),
        ({"beta_schedule": "linear", "thresholding": True}, "asks for thresholding .True., which is not supported"),
    ],
)
def test_schedulers_of_other_kinds_are_refused(config, words):
    with pytest.raises(DiffLensError, match=words):
        read_scheduler(config)


def test_the_built_in_schedules_are_those_of_ddpm_and_its_improvement():
    assert linear_betas()[[0, -1]].tolist() == [1e-4, 0.02] and float(linear_betas().diff().std()) < 1e-12

    def alpha(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for i in (0, 1, 500, 998, 999):
        assert float(cosine_betas()[i]) == pytest.approx(min(1 - alpha((i + 1) / 1000) / alpha(i / 1000), 0.999))


@pytest.mark.parametrize("timesteps", [1000, 250, 7])
@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_spaced_as_in_diffusers(timesteps, steps, spacing):
    scheduler = DDIMScheduler(num_train_timesteps=timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert ddim_timesteps(timesteps, steps, spacing) == scheduler.timesteps.tolist()


def test_spacing_ddim_is_every_kth_timestep_from_0():
    assert ddim_timesteps(1000, 50) == list(range(980, -1, -20))
    assert ddim_timesteps(1000, 30) == list(range(986, -1, -34))
    assert ddim_timesteps(1000, 1000) == list(range(999, -1, -1)) and ddim_timesteps(1000, 1) == [0]
    assert ddim_timesteps(4000, 50) == list(range(3920, -1, -80))
    with pytest.raises(DiffLensError, match="cannot take 60 of 1000 timesteps in equal strides. Use 59 or 63 steps"):
        ddim_timesteps(1000, 60)
    with pytest.raises(DiffLensError, match="8 steps cannot be taken of a model's 7 timesteps"):
        ddim_timesteps(7, 8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [980, 500, 20, 0])
def test_a_step_is_the_one_of_diffusers(toys, t, eta):
    """Ours in the variance-exploding form that ComfyUI samples in (signal 1), and in the preserving form."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    x, epsilon, noise = (toys.random(seed)(2, 3, 4, 4).double() for seed in range(3))
    expected = scheduler.step(epsilon, t, x, eta=eta, variance_noise=noise)
    clean, a = expected.pred_original_sample, scheduler.alphas_cumprod.double()
    now, then = float(a[t]), float(a[t - 20]) if t >= 20 else 1.0
    preserving = [(math.sqrt(part), math.sqrt(1 - part)) for part in (now, then)]
    found = ddim_step(x, clean, clean, *preserving, eta, noise)
    torch.testing.assert_close(found, expected.prev_sample, atol=1e-5, rtol=1e-5)
    exploding = [(1.0, math.sqrt((1 - part) / part)) for part in (now, then)]
    found = ddim_step(x / math.sqrt(now), clean, clean, *exploding, eta, noise) * math.sqrt(then)
    torch.testing.assert_close(found, expected.prev_sample, atol=1e-5, rtol=1e-5)


def test_with_two_pictures_the_one_gives_the_goal_and_the_other_the_direction(toys):
    x, clean, unedited, noise = (toys.random(seed)(5) for seed in range(4))
    found = ddim_step(x, clean, unedited, (0.6, 0.8), (0.8, 0.6), 0.0, noise)
    expected = 0.8 * clean.numpy() + 0.6 * (x - 0.6 * unedited).numpy() / 0.8
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_step_from_pure_noise_of_a_flow_model_is_finite_and_ends_on_the_picture(toys):
    x, clean, noise = (toys.random(seed)(5) for seed in range(3))
    assert torch.allclose(ddim_step(x, clean, clean, (0.0, 1.0), (0.1, 0.9), 1.0, noise), 0.1 * clean + 0.9 * noise)
    assert torch.equal(ddim_step(x, clean, clean, (0.9, 0.1), (1.0, 0.0), 1.0, noise), clean)
