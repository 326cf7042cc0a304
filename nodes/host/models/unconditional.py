"""Unconditional models of other programs as MODEL."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....difflens_core.files import DiffLensError, difflens_kind
from ....difflens_core.networks import Adm, AdmConfig, Checkpoint, Schedule, load_checkpoint, unet2d_class
from ..marks import FINGERPRINT, marks_of
from .avatars import load_unconditional
from .pixels import Hosted, after_middle, as_patcher, unconditional_conditioning

LOADED_BY = {"sae": "Load SAE", "recipe": "Load Recipe", "classifier": "Load Attribute Classifier"}


class HostedAdm(Hosted, Adm):
    def __init__(self, device: Any = None, dtype: Any = None, operations: Any = nn, **sizes: Any):
        super().__init__(AdmConfig(**sizes), operations, device=device, dtype=dtype)
        self.levels = len(self.config.channels)

    def _forward(self, x, timesteps, context, control, transformer_options, y=None):
        h, emb, skips = self.encode(x, timesteps, y)
        h = after_middle(self.middle_block(h, emb), x, emb, context, y, timesteps, transformer_options)
        return self.decode(h, emb, skips)


@functools.cache
def hosted_unet2d() -> type:
    """The class of diffusers' UNet2DModel for ComfyUI, made when it is first needed."""
    unet2d = unet2d_class()

    class HostedUNet2D(Hosted, unet2d):
        """Its layers are torch's own: ComfyUI loads it as a whole or not at all."""

        def __init__(self, device: Any = None, dtype: Any = None, operations: Any = nn, **settings: Any):
            with torch.device(device or "cpu"):
                unet2d.__init__(self, **settings)
            self.to(dtype)
            self.levels = len(settings["block_out_channels"])
            self.mid_block.out_channels = settings["block_out_channels"][-1]

        @property
        def middle_block(self) -> nn.Module:
            """The default site by the name that it has in all our models."""
            return self.mid_block

        def _forward(self, x, timesteps, context, control, transformer_options, y=None):
            def patch(_module: nn.Module, inputs: tuple, h: Tensor) -> Tensor:
                return after_middle(h, x, inputs[1], context, y, timesteps, transformer_options)

            handle = self.mid_block.register_forward_hook(patch)
            try:
                return unet2d.forward(self, x, timesteps.long(), y).sample
            finally:
                handle.remove()

    return HostedUNet2D


class DiscreteSampling(comfy.model_sampling.ModelSamplingDiscrete):
    """ComfyUI's sampling of models with a list of betas, for any list, with the clean picture clipped."""

    def __init__(self, schedule: Schedule):
        nn.Module.__init__(self)
        self.sigma_data, self.clip = 1.0, schedule.clip
        self._register_schedule(given_betas=schedule.betas)

    def percent_to_sigma(self, percent: float) -> float:
        """As ComfyUI's, which takes every model to have 1000 timesteps."""
        if 0 < percent < 1:
            return self.sigma(torch.tensor((1 - percent) * (len(self.sigmas) - 1))).item()
        return super().percent_to_sigma(percent)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        clean = super().calculate_denoised(sigma, model_output, model_input)
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """x at the first noise level: pure noise of variance 1 for the network if there is no picture to keep.

        DDIM starts so wherever its timesteps begin; ComfyUI only at the very last timestep. The start of a sampling is
        told by its sigma being a single number: inpainting passes one for each picture.
        """
        start = sigma.ndim == 0 and not latent_image.any()
        return super().noise_scaling(sigma, noise, latent_image, max_denoise or start)


PREDICTS = {
    "epsilon": comfy.model_sampling.EPS,
    "v_prediction": comfy.model_sampling.V_PREDICTION,
    "sample": comfy.model_sampling.X0,
}


class PixelConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}
    latent_format = comfy.latent_formats.ChromaRadiance  # 3 channels, as large as the picture
    supported_inference_dtypes = [torch.float16, torch.float32]


class PixelModel(comfy.model_base.BaseModel):
    """A network on pixels with a list of betas."""

    def __init__(self, config: PixelConfig, checkpoint: Checkpoint, network: type, device: torch.device):
        super().__init__(config, device=device, unet_model=network)
        self.classes, self.live_values = checkpoint.classes, checkpoint.live_values

        class ModelSampling(DiscreteSampling, PREDICTS[checkpoint.schedule.prediction]):
            pass

        self.model_sampling = ModelSampling(checkpoint.schedule)

    def encode_adm(self, class_label: int = 0, **kwargs: Any) -> Tensor | None:
        """The class that the conditioning asks for, if the model has classes."""
        return torch.tensor([class_label]) if self.classes else None

    def memory_required(self, input_shape: list[int], cond_shapes: dict = {}) -> float:  # noqa: B006
        """Bytes for one evaluation of pictures of that shape (B x 3 x H x W), without the weights."""
        pixels = input_shape[0] * input_shape[2] * input_shape[3]
        return pixels * self.live_values * comfy.model_management.dtype_size(self.get_dtype_inference())


def compute_dtype(weights: dict[str, Tensor], device: torch.device) -> torch.dtype:
    """fp16 where the device computes well in it, else fp32: diffusers' layers cannot cast as they go."""
    supported = PixelConfig.supported_inference_dtypes
    parameters = sum(tensor.numel() for tensor in weights.values())
    dtype = comfy.model_management.unet_dtype(model_params=parameters, supported_dtypes=supported)
    castless = comfy.model_management.unet_manual_cast(dtype, device, supported) is None
    return dtype if castless else torch.float32


def load_model(path: str, *choices: Any) -> tuple[ModelPatcher, str, int]:
    """A file or folder as MODEL, what was found in it, and how many classes it has.

    choices: as for `load_checkpoint`. Raises `DiffLensError` if it is no unconditional model.
    """
    kind = difflens_kind(path)
    if kind == "denoiser":
        return load_unconditional(path), "architecture: DiffLens denoiser", 0
    if kind is not None:
        use = f"Use {LOADED_BY[kind]}." if kind in LOADED_BY else "Expected a model."
        raise DiffLensError(f"{Path(path).name}: this is a DiffLens {kind} file. {use}")
    checkpoint = load_checkpoint(path, *choices)
    return as_model(checkpoint, (path, *choices)), checkpoint.report, checkpoint.classes


def as_model(checkpoint: Checkpoint, source: tuple, disable_dynamic: bool = False) -> ModelPatcher:
    """The checkpoint as MODEL; `source` is what `load_again` loads it from."""
    adm = isinstance(checkpoint.config, AdmConfig)
    dtype = compute_dtype(checkpoint.weights, comfy.model_management.get_torch_device())
    config = PixelConfig(asdict(checkpoint.config) if adm else checkpoint.config)
    config.set_inference_dtype(dtype, None)
    network, device = HostedAdm if adm else hosted_unet2d(), comfy.model_management.unet_offload_device()
    model = PixelModel(config, checkpoint, network, device)
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint.weights.items()}
    patcher = as_patcher(model, weights, (load_again, source), disable_dynamic)
    patcher.set_attachments(FINGERPRINT, marks_of(checkpoint.weights))
    return patcher


def load_again(path: str, *choices: Any, disable_dynamic: bool = False) -> ModelPatcher:
    """What ComfyUI calls where it needs a second copy of the network."""
    return as_model(load_checkpoint(path, *choices), (path, *choices), disable_dynamic)


def class_conditioning(class_label: int, classes: int) -> list:
    """A CONDITIONING that says nothing, or only the class to a model that has some."""
    if not classes:
        return unconditional_conditioning()
    if class_label >= classes:
        raise DiffLensError(f"class_label is {class_label}, the model has classes 0 to {classes - 1}.")
    return [[tensor, {"class_label": class_label}] for tensor, _ in unconditional_conditioning()]
