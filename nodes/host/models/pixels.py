"""What all networks on pixels share that ComfyUI does not know by itself."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....difflens_core.files import DiffLensError


def after_middle(
    h: Tensor, x: Tensor, emb: Tensor, context: Any, y: Tensor | None, timesteps: Tensor, transformer_options: dict
) -> Tensor:
    """h, the middle block's output, after the `middle_block_after_patch`es, called as ComfyUI's own UNet calls them."""
    transformer_options["block"] = ("middle", 0)
    for patch in transformer_options.get("patches", {}).get("middle_block_after_patch", ()):
        h = patch({
            "h": h, "x": x, "emb": emb, "context": context, "y": y, "timesteps": timesteps,
            "transformer_options": transformer_options,
        })["h"]  # fmt: skip
    return h


def unconditional_conditioning() -> list:
    """A CONDITIONING that says nothing. A tensor, because nodes that zero or join conditionings want one."""
    return [[torch.zeros(1, 1, 1), {}]]


def pixel_space_vae() -> comfy.sd.VAE:
    """The VAE that only maps [-1, 1] to [0, 1] and back."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


class Hosted:
    """The outer side of a ComfyUI diffusion model: checks the input, runs DIFFUSION_MODEL wrappers around `_forward`.

    `levels` is the number of sizes that the network works in. A learned variance is cut off.
    """

    levels: int

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, y=None, **kwargs):  # noqa: B006
        self.check_input(x, context)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, transformer_options, y=y)[:, :3]

    def check_input(self, x: Tensor, context: Tensor | None) -> None:
        """Raise `DiffLensError` if the network cannot run on such a latent or text."""
        multiple = 2 ** (self.levels - 1)
        if x.shape[1] != 3 or x.shape[2] % multiple or x.shape[3] % multiple:
            found = " x ".join(map(str, x.shape[1:]))
            raise DiffLensError(
                f"this model draws pictures whose sides are multiples of {multiple} pixels (latents of 3 channels), "
                f"got a latent of {found}. Set Empty Latent Image to such a size."
            )


def as_patcher(
    model: comfy.model_base.BaseModel, weights: dict[str, Tensor], again: tuple, disable_dynamic: bool
) -> ModelPatcher:
    """A MODEL with these weights; again: function and arguments by which ComfyUI loads a second copy of it."""
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())
    model.load_model_weights(weights, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = again
    return patcher
