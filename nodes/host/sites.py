"""What a site's name means in ComfyUI's networks: which module, and what of its input and output is the picture's."""

from __future__ import annotations

import math
from os.path import commonprefix
from typing import Any

import comfy.utils
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import JointBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformerBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...difflens_core.activations import UPDATE, Whole, find_site, from_map, reads_update, to_map
from ...difflens_core.files import DiffLensError
from ...difflens_core.networks import Denoiser, ResBlock, Stack

MIDDLE_BLOCK = "middle_block"
# Blocks that hand two streams on, by their class or, of other packs' classes, by the stack they are in: the picture's
# place in the output, and among the arguments or their names.
TWO_STREAMS = {
    (DoubleStreamBlock, "double_blocks"): (0, "img"),
    (JointBlock, "joint_blocks"): (1, 1),
    (QwenImageTransformerBlock, "transformer_blocks"): (1, "hidden_states"),
}
# Stacks whose blocks have the picture's tokens last, behind the text's and those of references, by their network.
LAST = ((HunyuanVideo, ("double_blocks", "single_blocks")), (NextDiT, ("layers", "noise_refiner")))
WITHOUT_PICTURE = ("context_refiner", "siglip_refiner")  # stacks through which no token of the picture goes
ONE_STREAM = "single_blocks"  # blocks of this stack have the text's tokens before the picture's
# Stacks of blocks by diffusers' names, and what ComfyUI's networks call them.
STACKS = {
    "transformer_blocks": ("double_blocks", "joint_blocks"),
    "single_transformer_blocks": ("single_blocks",),
    "mid_block": ("middle_block",),
}


def own_name(model: ModelPatcher, site: str) -> str:
    """The site by the name that the model's network has for it, if `site` is diffusers' name; else as it is."""
    network, module = model.model.diffusion_model, site.removesuffix(UPDATE)
    head, dot, rest = module.partition(".")
    if hasattr(network, head):
        return site
    own = ""
    if isinstance(network, UNetModel):
        weights = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        inside = [own for theirs, own in weights.items() if theirs.startswith(f"{module}.")]
        own = commonprefix(inside).rpartition(".")[0]  # what the names of all weights in the module begin with
    if own in ("", "input_blocks", "output_blocks"):
        own = next((stack + dot + rest for stack in STACKS.get(head, ()) if hasattr(network, stack)), module)
    return own + UPDATE if reads_update(site) else own


def site_width(model: ModelPatcher, site: str) -> int | None:
    """Channels that `site` puts out, None if only running the model can tell.

    Raises `DiffLensError` if the model has no such module, or one whose output cannot be reached.
    """
    network, site = model.model.diffusion_model, own_name(model, site)
    module = find_site(network, site)
    if site == MIDDLE_BLOCK:
        if isinstance(network, Denoiser):
            return network.config.width
        if isinstance(module, nn.Sequential):
            module = module[-1]
    elif isinstance(module, TimestepEmbedSequential) or type(module) is nn.ModuleList:
        name = site.removesuffix(UPDATE)
        raise DiffLensError(
            f"{name} only groups modules and is never run itself. Use the last module in it: "
            f"{site.replace(name, f'{name}.{len(module) - 1}')}."
        )
    return getattr(module, "out_channels", None)


def some_sites(model: ModelPatcher) -> list[str]:
    """Sites of a network worth a scan, from its input to its output.

    Of a U-Net as ComfyUI builds it the last module of three blocks before and after the middle (some distilled ones
    have nothing there); of diffusers' the last residual block of every level; of other networks the modules right below
    it that put out a map, as far as their type tells, with the first of each stack (the first and the last convolution
    only touch pixels), and three of each list of blocks.
    """
    network = model.model.diffusion_model

    def three(name: str) -> list[str]:
        blocks = getattr(network, name)
        chosen = sorted({len(blocks) // 4, len(blocks) // 2, len(blocks) - 1})
        last = [f".{len(block) - 1}" if isinstance(block, TimestepEmbedSequential) else "" for block in blocks]
        return [f"{name}.{i}{last[i]}" for i in chosen]

    if hasattr(network, "input_blocks") and hasattr(network, "output_blocks"):
        middle = [] if network.middle_block is None else [MIDDLE_BLOCK]
        return [*three("input_blocks"), *middle, *three("output_blocks")]
    if hasattr(network, "down_blocks"):  # diffusers
        down, up = (
            [f"{name}.{i}.resnets.{len(block.resnets) - 1}" for i, block in enumerate(getattr(network, name))]
            for name in ("down_blocks", "up_blocks")
        )
        return [*down, MIDDLE_BLOCK, *up]
    found = []
    for name, module in network.named_children():
        if type(module) is nn.ModuleList and name not in WITHOUT_PICTURE:
            found += three(name)
        if isinstance(module, Stack):
            found.append(f"{name}.0")
        if isinstance(module, (Stack, ResBlock, nn.Conv2d)) and name not in ("conv_in", "conv_out"):
            found.append(name)
    return found


def run_name(network: nn.Module, site: str) -> str:
    """The module of a site that is really run: of ComfyUI's middle block, a mere group, the last module in it."""
    module = find_site(network, site)
    if site == MIDDLE_BLOCK and isinstance(module, TimestepEmbedSequential):
        return f"{site}.{len(module) - 1}"
    return site


def place_of(network: nn.Module, site: str) -> tuple[int | None, int | str]:
    """Where the picture is in what the block of a site puts out and takes: None, 0 if that is one tensor."""
    module, stack = find_site(network, site), site.removesuffix(UPDATE).rpartition(".")[0]
    module = getattr(module, "_orig_mod", module)  # a block that was compiled by itself
    by_class = (place for (kind, _), place in TWO_STREAMS.items() if isinstance(module, kind))
    by_stack = (place for (_, name), place in TWO_STREAMS.items() if name == stack)
    return next(by_class, None) or next(by_stack, (None, 0))


def padded_to(network: nn.Module, site: str) -> int | None:
    """Of what the picture's tokens are filled up to a multiple, where they are the last ones; else None."""
    stack = site.removesuffix(UPDATE).rpartition(".")[0]
    if not any(isinstance(network, kind) and stack in stacks for kind, stacks in LAST):
        return None
    return getattr(network, "pad_tokens_multiple", None) or 1


def picture_grid(network: nn.Module, x: Tensor) -> tuple[int, int] | None:
    """Sides of the map that the picture's tokens form for latents x (B x C x ... x H x W), frames below each other.

    None if the network does not tell its patch size.
    """
    patch = getattr(network, "patch_size", None)
    if patch is None:
        return None
    patches = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
    patches = (1,) * (x.ndim - 2 - len(patches)) + patches
    *frames, height, width = (math.ceil(side / size) for side, size in zip(x.shape[2:], patches, strict=True))
    return math.prod(frames) * height, width


class Picture(Whole):
    """The picture's part of what a module takes and gives, tokens as a map as the picture lies.

    Blocks of two streams hand the picture on beside the text, Flux's single blocks behind it (`img_slice`). Tokens of
    reference pictures follow the picture's own, in the networks of `LAST` come before them, and are left out.
    """

    def __init__(self, network: nn.Module, site: str, x: Tensor, text: int = 0):
        """`x`: the latents that the network is run on; text: how many tokens of text it is given."""
        self.place, self.argument = place_of(network, site)
        self.site, self.grid, self.padded = site, picture_grid(network, x), padded_to(network, site)
        self.text = text if site.removesuffix(UPDATE).rpartition(".")[0] == ONE_STREAM else None

    def given(self, args: tuple, kwargs: dict) -> Tensor:
        if self.place is None:
            found = next(iter((*args, *kwargs.values())))
        else:
            found = kwargs[self.argument] if self.argument in kwargs else args[self.argument]
        return self.map_of(found, kwargs)

    def read(self, output: Any, kwargs: dict) -> Tensor:
        return self.map_of(output[self.place] if self.two_streams(output) else output, kwargs)

    def write(self, output: Any, kwargs: dict, h: Tensor) -> Any:
        if not self.two_streams(output):
            return self.replaced(output, kwargs, h)
        streams = list(output)
        streams[self.place] = self.replaced(streams[self.place], kwargs, h)
        return tuple(streams)

    def two_streams(self, output: Any) -> bool:
        """Whether this is what a block of two streams hands on: another pack's block may hand on the picture alone."""
        return self.place is not None and isinstance(output, (tuple, list))

    def map_of(self, found: Any, kwargs: dict) -> Any:
        """What a module takes or gives as a map; what is neither map nor tokens as it is."""
        if not isinstance(found, Tensor) or found.ndim != 3:
            return found
        options = kwargs.get("transformer_options", {})
        grid = self.grid or tuple(options.get("activations_shape", ())[2:])  # told by a U-Net's transformers
        tokens = found[:, self.tokens(found, kwargs)]
        return to_map(tokens, grid if math.prod(grid) == tokens.shape[1] else None)

    def replaced(self, found: Tensor, kwargs: dict, h: Tensor) -> Tensor:
        """The map, or the tokens with the picture's replaced by the map h."""
        if found.ndim != 3:
            return h
        edited = found.clone()
        edited[:, self.tokens(found, kwargs)] = from_map(h, 3)
        return edited

    def tokens(self, found: Tensor, kwargs: dict) -> slice:
        """Which of the tokens (B x T x C) are the picture's."""
        known = self.place is not None
        first = 0
        if not known and "img_slice" in kwargs.get("transformer_options", {}):
            known, first = True, kwargs["transformer_options"]["img_slice"][0]
        elif self.text is not None:  # a block that is not told where its picture is
            known, first = True, self.text
        count = math.prod(self.grid) if self.grid else found.shape[1] - first
        if self.padded:
            known, first = True, found.shape[1] - math.ceil(count / self.padded) * self.padded
        left = found.shape[1] - first - count
        if left < 0 or first < 0 or (left and not known):
            raise DiffLensError(
                f"{self.site} has {found.shape[1]} tokens, the picture has {count}, and which of them are the "
                "picture's is not known. Use a whole block."
            )
        return slice(first, first + count)
