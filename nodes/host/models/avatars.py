"""The avatars as ComfyUI models: the denoiser as MODEL, and the text encoder of those that draw by prompt as CLIP."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import torch
from comfy import sd1_clip
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ....difflens_core.files import DiffLensError
from ....difflens_core.networks import END, Denoiser, DenoiserConfig, TextEncoder, load_denoiser_weights, tokenize
from .pixels import Hosted, after_middle, as_patcher

LATENT = 8  # pixels a side of what Empty Latent Image takes for one latent, unless it hands on that they are pixels
PATCH = 8  # pixels a side of what one position of the middle block stands for
TIMESTEPS = 1000  # what ComfyUI's flow models multiply sigma by


class HostedDenoiser(Hosted, Denoiser):
    """The denoiser as a ComfyUI diffusion model: it tells the velocity (x - x0) / sigma, as flow models do."""

    def __init__(self, device: Any = None, dtype: Any = None, operations: Any = nn, **sizes: int):
        super().__init__(DenoiserConfig(**sizes), operations, device=device, dtype=dtype)

    def check_input(self, x: Tensor, context: Tensor | None) -> None:
        """See `Hosted.check_input`; x must be B x 3 x size x size, or of any multiples of 8."""
        size, width = self.config.size, self.config.context_width
        if not self.draws(x):
            found, node = " x ".join(map(str, x.shape[1:])), "Prompted" if width else "Unconditional"
            pictures = f"{size} x {size} pictures (latents 3 x {size} x {size})"
            if self.config.any_size:
                pictures = f"pictures whose sides are multiples of {PATCH} pixels, from {size // 2} on"
            ask = f"Set Empty Latent Image to {size} x {size}."
            if x.shape[2:] == (size // LATENT, size // LATENT):
                ask = (
                    "A node between Empty Latent Image and the sampler, such as Rebatch Latents, does not hand on that "
                    f"these are pixels: set Empty Latent Image to {LATENT * size} x {LATENT * size} there, or use "
                    "Latent From Batch."
                )
            raise DiffLensError(f"Load {node} Model: this model draws {pictures}, got a latent of {found}. {ask}")
        if width and (context is None or context.shape[-1] != width):
            found = "none" if context is None else f"one of width {context.shape[-1]}"
            raise DiffLensError(
                f"Load Prompted Model: this model reads a text of width {width}, got {found}. Connect CLIP Text Encode "
                "with the CLIP of the same Load Prompted Model."
            )

    def draws(self, x: Tensor) -> bool:
        """Whether x is of pictures that this model draws."""
        (channels, *sides), size = x.shape[1:], self.config.size
        if not self.config.any_size:
            return (channels, *sides) == (3, size, size)
        return channels == 3 and min(sides) >= size // 2 and not any(side % PATCH for side in sides)

    def _forward(self, x, timesteps, context, control, transformer_options, y=None):
        """Velocity (like x) at `timesteps` (B, 1000 sigma)."""
        sigma = timesteps / TIMESTEPS
        h, emb = self.encode(x, sigma)
        middle = self.middle_block(h, emb, context if self.config.context_width else None)
        h = after_middle(middle, x, emb, context, None, timesteps, transformer_options)
        return (x - self.decode(h, emb)) / sigma[:, None, None, None]


class UnconditionalConfig(comfy.supported_models_base.BASE):
    """Rectified flow on pixels: x_t = (1 - sigma) x0 + sigma noise, without a shift."""

    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": TIMESTEPS}
    latent_format = comfy.latent_formats.ChromaRadiance  # 3 channels, as large as the picture
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 0.03


def load_unconditional(path: str) -> ModelPatcher:
    """A denoiser that draws without prompts as a MODEL. Raises `DiffLensError` if the file does not fit."""
    sizes, weights, text = load_denoiser_weights(path)
    if text is not None:
        raise DiffLensError(f"{Path(path).name} draws by prompt. Load it with Load Prompted Model.")
    return as_model(path, sizes, weights)


def load_again(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """What ComfyUI calls where it needs a second copy of the network."""
    sizes, weights, _ = load_denoiser_weights(path)
    return as_model(path, sizes, weights, disable_dynamic)


def as_model(
    path: str, sizes: DenoiserConfig, weights: dict[str, Tensor], disable_dynamic: bool = False
) -> ModelPatcher:
    """The denoiser of the file `path` as a MODEL that stock samplers take."""
    config = UnconditionalConfig(asdict(sizes))
    config.set_inference_dtype(torch.float32, None)
    flow, device = comfy.model_base.ModelType.FLOW, comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, flow, device=device, unet_model=HostedDenoiser)
    return as_patcher(model, weights, (load_again, (path,)), disable_dynamic)


class PromptTokenizer:
    """Words and their weights, such as (doctor:1.3), for ComfyUI's CLIP."""

    def __init__(self, words: Sequence[str], length: int):
        self.words, self.length = words, length

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict:
        """Chunks of `length` pairs (token, weight); with `return_word_ids` of (token, weight, number of the word)."""
        found = [
            (token, weight)
            for part, weight in sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
            for token in tokenize(sd1_clip.unescape_important(part), self.words)
        ]
        found += [(END, 1.0)] * (-len(found) % self.length if found else self.length)
        if return_word_ids:
            found = [(*pair, number + 1 if pair[0] != END else 0) for number, pair in enumerate(found)]
        return {"difflens": [found[i : i + self.length] for i in range(0, len(found), self.length)]}


class HostedTextEncoder(nn.Module, sd1_clip.ClipTokenWeightEncoder):
    """The text encoder as the model behind ComfyUI's CLIP, which weighs tokens by their distance from no prompt."""

    special_tokens: ClassVar = {"pad": END}

    def __init__(self, text: TextEncoder, device: Any = None, dtype: Any = None, model_options: Any = None):
        super().__init__()
        self.text, self.dtypes = text.to(device, dtype), {dtype}

    def set_clip_options(self, options: dict) -> None:
        """ComfyUI offers to skip layers or to move; there is one way to encode here."""

    reset_clip_options = lambda self: None  # noqa: E731

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None]:
        return super().encode_token_weights([[pair[:2] for pair in chunk] for chunk in tokens["difflens"]])

    def encode(self, tokens: list[list[int]]) -> tuple[Tensor, None]:
        return self.text(torch.tensor(tokens, device=self.text.position.device)), None


def load_prompted(path: str) -> tuple[ModelPatcher, comfy.sd.CLIP]:
    """A denoiser that draws by prompt, and its text encoder as CLIP. Raises `DiffLensError` if it has none."""
    sizes, weights, text = load_denoiser_weights(path)
    if text is None:
        raise DiffLensError(f"{Path(path).name} draws without prompts. Load it with Load Unconditional Model.")
    target = comfy.supported_models_base.ClipTarget(
        lambda **_: PromptTokenizer(text.words, text.length), functools.partial(HostedTextEncoder, text)
    )
    return as_model(path, sizes, weights), comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
