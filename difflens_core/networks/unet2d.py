"""diffusers' UNet2DModel: what its weights and configuration tell. diffusers itself is needed only to build one."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import DiffLensError

# What no weight tells, for a file without a configuration: the settings of the published DDPM models (Ho et al. 2020).
DDPM_HABITS = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet2d_class() -> type:
    """diffusers' UNet2DModel. Raises `DiffLensError` that says how to install it if it is absent."""
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:  # diffusers raises RuntimeError if something that it needs is broken
        absent = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if absent else f"cannot be imported ({str(error).splitlines()[-1]})"
        raise DiffLensError(
            f"this is a diffusers UNet2DModel, and diffusers {reason}. Run "
            f'"{sys.executable} -m pip install diffusers" and start again.'
        ) from error
    return UNet2DModel


def current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with today's names: attention was called otherwise when the DDPM models were published."""
    old = re.compile(rf"(.*\.attentions\.\d+\.)({'|'.join(OLD_NAMES)})(\.\w+)")
    renamed = {name: old.fullmatch(name) for name in weights}
    return {(m[1] + OLD_NAMES[m[2]] + m[3] if m else name): weights[name] for name, m in renamed.items()}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet2DModel is built from, all defaults filled in; other entries of a config.json are left out.

    Raises `DiffLensError` if we cannot sample such a model.
    """
    parameters = inspect.signature(unet2d_class()).parameters
    unknown = [n for n, value in config.items() if value and n not in parameters and not n.startswith("_")]
    if unknown:
        raise DiffLensError(
            f"its configuration sets {', '.join(unknown)}, which the installed diffusers does not know. Update "
            "diffusers, or use another model."
        )
    config = {name: config.get(name, p.default) for name, p in parameters.items() if p.default is not p.empty}
    if config["time_embedding_type"] == "fourier":
        raise DiffLensError("its time embedding is of a score-based model (SDE). Only DDPM-like models are supported.")
    if config["class_embed_type"] is not None:
        raise DiffLensError(f"class_embed_type {config['class_embed_type']} is not supported, only a table of classes.")
    if config["mid_block_type"] is None:
        raise DiffLensError("it has no mid block, and so no site to steer.")
    return config


def infer_unet2d(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration that weights (`current_names`) tell, the rest as `DDPM_HABITS`.

    Raises `DiffLensError` if one is missing that every such model has.
    """
    try:
        return _infer(weights)
    except (KeyError, IndexError) as error:
        raise DiffLensError(f"not a complete UNet2DModel (looking for {error}).") from error


def _infer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    def has(name: str) -> bool:
        return f"{name}.weight" in weights

    def size(name: str, axis: int = 0) -> int:
        return weights[f"{name}.weight"].shape[axis]

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, weights) if m), default=-1)

    levels = count(r"down_blocks\.(\d+)\.")
    channels = [size(f"down_blocks.{i}.resnets.0.conv1") for i in range(levels)]
    resnet = {way: any(has(f"{way}_blocks.{i}.{way}samplers.0.conv1") for i in range(levels)) for way in ("down", "up")}
    config = {
        "in_channels": size("conv_in", 1),
        "out_channels": size("conv_out"),
        "block_out_channels": channels,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": [
            "AttnDownBlock2D" if has(f"down_blocks.{i}.attentions.0.to_q") else "DownBlock2D" for i in range(levels)
        ],
        "up_block_types": [
            "AttnUpBlock2D" if has(f"up_blocks.{i}.attentions.0.to_q") else "UpBlock2D" for i in range(levels)
        ],
        "add_attention": has("mid_block.attentions.0.to_q"),
        "time_embedding_dim": size("time_embedding.linear_1"),
        **{f"{way}sample_type": "resnet" if found else "conv" for way, found in resnet.items()},
        **DDPM_HABITS,
    }
    if size("mid_block.resnets.0.time_emb_proj") == 2 * channels[-1]:
        config |= {"resnet_time_scale_shift": "scale_shift"}
        if has("mid_block.attentions.0.group_norm"):
            config |= {"attn_norm_num_groups": 32}
    if has("class_embedding"):
        config |= {"num_class_embeds": size("class_embedding")}
    if "time_proj.weight" in weights:
        config |= {"time_embedding_type": "fourier"}
        if weights["time_proj.weight"].ndim == 2:
            config |= {"time_embedding_type": "learned", "num_train_timesteps": size("time_proj")}
    return read_config(config)


def check_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` if the weights are not those of a UNet2DModel of that configuration."""
    levels, layers = config["block_out_channels"], config["layers_per_block"]
    try:
        if len(levels) * layers > len(weights):  # it would take forever to build
            raise ValueError(f"{len(levels)} levels of {layers} layers and {len(weights)} tensors")
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in unet2d_class()(**config).state_dict().items()}
    except Exception as error:  # diffusers checks little, so a configuration that is damaged brings up anything
        raise DiffLensError(f"diffusers cannot build a UNet2DModel of its configuration ({error}).") from error
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise DiffLensError(f"its weights do not fit its configuration as a UNet2DModel ({', '.join(wrong[:3])}).")
