"""Checkpoints of unconditional models by other programs: what a file or folder holds, told by its content."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import DiffLensError, finite, read_content, read_json, reading, refuse_whole_numbers
from .adm import P2_FACES, AdmConfig, infer_config
from .schedules import BETAS, Schedule, linear_betas, read_scheduler
from .unet2d import check_weights, current_names, infer_unet2d, read_config

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
CONFIG = "config.json"
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
                  "diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
AUTO = "auto"


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from disk. config: an `AdmConfig`, or the settings of a diffusers UNet2DModel; weights: by the
    names of the network's modules, as in the file; report: what was found and what was assumed, a line each."""

    config: AdmConfig | dict[str, Any]
    weights: dict[str, Tensor]
    schedule: Schedule
    report: str

    @property
    def classes(self) -> int:
        """Number of classes that the model was trained with, 0 for none."""
        return self.config.classes if isinstance(self.config, AdmConfig) else self.config["num_class_embeds"] or 0

    @property
    def in_channels(self) -> int:
        return self.config.in_channels if isinstance(self.config, AdmConfig) else self.config["in_channels"]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the full size to the smallest."""
        return tuple(self.config.channels if isinstance(self.config, AdmConfig) else self.config["block_out_channels"])

    @property
    def live_values(self) -> float:
        """Numbers that the network holds at once for each pixel, about: what it keeps for the decoder, and what the
        decoder works with at the full size. Measured, it holds 0.8 to 1.2 times as many."""
        config, kept = self.config, float(self.widths[0])
        blocks = config.res_blocks if isinstance(config, AdmConfig) else config["layers_per_block"]
        for level, width in enumerate(self.widths):
            kept += width * blocks / 4**level
            if level < len(self.widths) - 1:
                kept += width / 4 ** (level + 1)
        return kept + 6 * max(self.widths[:2])


def load_checkpoint(
    path: str | Path, schedule: str = AUTO, prediction: str = AUTO, heads: int = 0, new_attention_order: bool = False
) -> Checkpoint:
    """An ADM checkpoint or a diffusers UNet2DModel, a file or a folder with its config.json.

    schedule ("linear" or "cosine") and prediction (of PREDICTIONS) stand in for what a file does not say; "auto" takes
    the scheduler_config.json of a folder, else linear and epsilon. heads, new_attention_order: see `infer_config`.
    Raises `DiffLensError` that says what the file is if it is something else, cut off or damaged.
    """
    path = Path(path)
    notes: list[str] = []
    with reading(path):
        found = _read_folder(path, notes) if path.is_dir() else _read_file(path, heads, new_attention_order, notes)
        found = replace(found, weights=finite(found.weights))
        refuse_whole_numbers(found.weights)
    if found.in_channels != 3:
        what = " It is an upsampler, which needs a small picture as well." if found.in_channels == 6 else ""
        raise DiffLensError(
            f"{path.name}: this model takes pictures of {found.in_channels} channels.{what} Expected 3, for red, green "
            "and blue."
        )
    settings = found.schedule
    if schedule != AUTO:
        settings = replace(settings, betas=BETAS[schedule]())
    if prediction != AUTO:
        settings = replace(settings, prediction=prediction)
    size = 8 * 2 ** (len(found.widths) - 1)
    notes += [
        f"sampling: {len(settings.betas)} timesteps, beta {float(settings.betas[0]):.2g} to "
        f"{float(settings.betas[-1]):.2g}, predicts {settings.prediction}, "
        + (f"clean picture clipped to {settings.clip:g}" if settings.clip else "clean picture not clipped"),
        f"classes: {found.classes or 'none'}",
        f"size: any multiple of {size // 8} pixels; such networks usually draw {size} x {size}",
    ]
    return replace(found, schedule=settings, report="\n".join(notes))


def _read_file(path: Path, heads: int, new_order: bool, notes: list[str]) -> Checkpoint:
    weights = unwrap(read_content(path), notes)
    refuse_other_kinds(weights)
    schedule = Schedule(linear_betas())
    config: AdmConfig | dict[str, Any]
    if "output_blocks.0.0.in_layers.0.weight" in weights:
        config = infer_config(weights, heads, new_order)
        preset = " (P2's settings for faces)" if config == P2_FACES else ""
        each = f"{config.head_channels} channels each" if config.head_channels else f"{config.heads} in each"
        order = "new" if new_order else "legacy"
        notes += [
            f"architecture: ADM U-Net{preset}, channels {', '.join(map(str, config.channels))}, "
            f"{config.res_blocks} blocks a level",
            f"attention heads: {each}, {order} order ({'as asked' if heads or new_order else 'assumed'})",
        ]
        notes.append("note: no schedule in the file; linear and epsilon are assumed unless you choose otherwise")
        if averaged := better_file(path):
            notes.append(f"note: {averaged} beside it holds the averaged weights (EMA), which draw better")
    else:
        weights = current_names(weights)
        config = infer_unet2d(weights)
        check_weights(config, weights)
        notes += [f"architecture: diffusers UNet2DModel, channels {', '.join(map(str, config['block_out_channels']))}"]
        notes.append("note: no config.json; one attention head, the linear schedule and epsilon are assumed, as in the "
                     "published DDPM models")  # fmt: skip
    return Checkpoint(config, weights, schedule, "")


def _read_folder(folder: Path, notes: list[str]) -> Checkpoint:
    config = read_json(folder / CONFIG, f"{CONFIG} cannot be read: it")
    kind = config.get("_class_name") or "model without a name"
    if kind != "UNet2DModel":
        raise DiffLensError(f"{CONFIG} says that this is a {kind}, expected a diffusers "
                            f"UNet2DModel. {NODE_OF_CLASS.get(kind, '')}".strip())  # fmt: skip
    file = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise DiffLensError(f"no weights beside {CONFIG}. Expected {FOLDER_WEIGHTS[0]}: download it into that folder.")
    config, weights = read_config(config), current_names(unwrap(read_content(file), notes))
    check_weights(config, weights)
    notes += [f"architecture: diffusers UNet2DModel, channels {', '.join(map(str, config['block_out_channels']))}"]
    places = folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        notes.append("note: no scheduler_config.json; linear and epsilon are assumed unless you choose otherwise")
    schedule = read_scheduler(read_json(scheduler)) if scheduler else Schedule(linear_betas())
    return Checkpoint(config, weights, schedule, "")


def unwrap(content: Any, notes: list[str]) -> dict[str, Tensor]:
    """The network's weights in what a training program saved, averaged ones (EMA) first, without a common prefix."""
    if isinstance(content, Mapping):
        if {"state", "param_groups"} <= content.keys():
            raise DiffLensError("this is the state of an optimiser. Load the weights saved beside it, ema_... if there "
                                "are any.")  # fmt: skip
        for key in ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                notes.append(f'weights: the entry "{key}" of the file')
                return unwrap(content[key], [])
    items = content.items() if isinstance(content, Mapping) else ()
    weights = {str(name): value.detach() for name, value in items if isinstance(value, Tensor)}
    for prefix in ("module.", "model.", "unet."):
        if weights and all(name.startswith(prefix) for name in weights) and not name_of_latent_model(weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def better_file(path: Path) -> str | None:
    """The averaged weights beside model500000.pt, which guided-diffusion calls ema_0.9999_500000.pt."""
    step = re.fullmatch(r"model(\d+)", path.stem)
    return next((p.name for p in sorted(path.parent.glob(f"ema_*_{step[1]}{path.suffix}"))), None) if step else None


# --- what else a file may be ---


def name_of_latent_model(weights: Mapping[str, Any]) -> bool:
    return any(name.startswith("model.diffusion_model.") for name in weights)


def _any(*parts: str) -> Callable[[Mapping[str, Any]], bool]:
    pattern = re.compile("|".join(parts))
    return lambda weights: any(map(pattern.search, weights))


# Tried in order: a test of the names, what the file is, and how it is loaded.
OTHER_KINDS: tuple[tuple[Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (
        _any(r"lora[_.](up|down|[AB])\b", r"\.hada_w1", r"\.lokr_w"),
        "a LoRA, not a model",
        "Load the model here and the LoRA with Load LoRA.",
    ),
    (
        _any(r"^control_model\.", r"input_hint_block", r"controlnet_cond_embedding"),
        "a ControlNet",
        "Use Load ControlNet Model.",
    ),
    (
        lambda weights: name_of_latent_model(weights) or _any(r"^cond_stage_model\.", r"^conditioner\.")(weights),
        "a checkpoint of a prompt model such as Stable Diffusion",
        "Use Load Checkpoint.",
    ),
    (
        _any(r"(input|middle|output)_blocks?\..*transformer_blocks", r"(down|mid|up)_blocks?\..*transformer_blocks"),
        "the U-Net of a prompt model such as Stable Diffusion",
        "Use Load Diffusion Model.",
    ),
    (
        _any(
            r"(double|single|joint)_(stream_)?blocks\.\d",
            r"^(model\.)?transformer_blocks\.\d",
            r"^x_embedder\.",
            r"^(model\.)?blocks\.\d+\..*(attn|adaLN)",
        ),
        "a diffusion transformer (DiT)",
        "Use Load Diffusion Model if it takes prompts; others are not supported.",
    ),  # fmt: skip
    (_any(r"^(text_model|transformer\.text_model|shared|encoder\.block)\."), "a text encoder", "Use Load CLIP."),
    (_any(r"^(first_stage_model\.)?(en|de)coder\.(conv_in|mid|down|up)"), "a VAE", "Use Load VAE."),
    (
        lambda weights: "input_blocks.0.0.weight" in weights and not _any(r"^output_blocks\.")(weights),
        "guided-diffusion's classifier or half of a model",
        "Load the diffusion model; the classifier is not used.",
    ),
    (
        lambda weights: {"encoder.weight", "encoder.bias"} <= weights.keys() or "W_enc" in weights,
        "a sparse autoencoder",
        "Use Load SAE.",
    ),
)
NODE_OF_CLASS = {
    "UNet2DConditionModel": "It takes prompts: use Load Diffusion Model.",
    "AutoencoderKL": "Use Load VAE.",
    "VQModel": "Models of VQ latents are not supported.",
}  # fmt: skip


def refuse_other_kinds(weights: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` that says what the weights are and which node loads them, unless it may be a model of ours.

    Goes by names, because every family of models has its own.
    """
    for test, what, remedy in OTHER_KINDS:
        if test(weights):
            raise DiffLensError(f"this is {what}. {remedy}")
    unet2d = {"conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.conv1.weight"}
    if "output_blocks.0.0.in_layers.0.weight" not in weights and not unet2d <= weights.keys():
        names = ", ".join(list(weights)[:4]) or "none"
        raise DiffLensError(
            f"not a model that this node knows (its tensors: {names}). Expected the avatars' kind, a guided-diffusion "
            "or P2 checkpoint, or a diffusers UNet2DModel."
        )
