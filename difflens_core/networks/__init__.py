"""Denoisers that run without a host, their noise schedules, and how pictures are sampled with them."""

from .adm import Adm, AdmConfig
from .checkpoints import AUTO, CONFIG, WEIGHTS, Checkpoint, load_checkpoint
from .denoiser import (
    Denoiser,
    DenoiserConfig,
    ResBlock,
    Stack,
    load_denoiser,
    load_denoiser_weights,
    load_prompted,
    save_denoiser,
)
from .diffusers import DiffusersSampler, FlowSampler
from .sampling import DenoiserSampler, Guidance, sample, start_noise
from .schedules import BETAS, PREDICTIONS, SPACINGS, Schedule, ddim_step, ddim_timesteps, read_scheduler
from .text import END, UNKNOWN, TextEncoder, tokenize
from .unet2d import unet2d_class

__all__ = [
    "AUTO",
    "Adm",
    "AdmConfig",
    "BETAS",
    "CONFIG",
    "Checkpoint",
    "Denoiser",
    "DenoiserConfig",
    "DenoiserSampler",
    "DiffusersSampler",
    "END",
    "FlowSampler",
    "Guidance",
    "PREDICTIONS",
    "ResBlock",
    "SPACINGS",
    "Schedule",
    "Stack",
    "TextEncoder",
    "UNKNOWN",
    "WEIGHTS",
    "ddim_step",
    "ddim_timesteps",
    "load_checkpoint",
    "load_denoiser",
    "load_denoiser_weights",
    "load_prompted",
    "read_scheduler",
    "sample",
    "save_denoiser",
    "start_noise",
    "tokenize",
    "unet2d_class",
]
