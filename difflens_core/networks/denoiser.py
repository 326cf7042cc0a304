"""The small unconditional denoiser of the avatars: a network whose every path runs through one site.

A U-Net's long skips let the picture by-pass the mid block, and then steering the mid block cannot change what
the skips carry. This network has none: encoder, 8x8 `middle_block`, decoder. Whatever the picture shows has
passed through `middle_block`, so a full swap of its output swaps the picture.

It predicts the clean picture x0 under the rectified-flow schedule x_t = (1 - sigma) x0 + sigma noise. At sigma 1
nothing of the picture is left, so overall colour is the model's own choice and not the noise's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError, as_half, load_tensors, reading, refuse_whole_numbers, save_tensors
from .text import TextEncoder


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a `Denoiser`. The site `middle_block` is B x width x height/8 x width/8 of the picture.

    size: side of the square pictures; any_size: whether it was trained on other heights and widths, too, multiples of
    8, and with attention that sees how far apart positions are. context_width: channels of the text that
    `middle_block` attends to, 0 for a model without prompts.
    """

    size: int = 64
    width: int = 256
    outer_width: int = 96
    middle_depth: int = 2
    decoder_depth: int = 2
    heads: int = 4
    context_width: int = 0
    any_size: bool = False


class Modulated(nn.Module):
    """A residual branch whose normalised input is scaled and shifted by the noise level (adaptive norm)."""

    def __init__(self, channels: int, emb: int, ops: Any, **factory: Any):
        super().__init__()
        self.norm = ops.GroupNorm(8, channels, **factory)
        self.modulation = ops.Linear(emb, 3 * channels, **factory)
        if ops is nn:  # a host's layers hold no weights before a file is loaded
            # A closed gate at the start: every block begins as the identity (Peebles & Xie 2023, adaLN-Zero).
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def modulate(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.modulation(emb)[:, :, None, None].chunk(3, dim=1)
        return self.norm(x) * (1 + scale) + shift, gate


class ResBlock(Modulated):
    def __init__(self, channels: int, emb: int, ops: Any, **factory: Any):
        super().__init__(channels, emb, ops, **factory)
        self.conv_in = ops.Conv2d(channels, channels, 3, padding=1, **factory)
        self.conv_out = ops.Conv2d(channels, channels, 3, padding=1, **factory)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, gate = self.modulate(x, emb)
        return x + gate * self.conv_out(F.silu(self.conv_in(F.silu(h))))


class Attention(Modulated):
    """Self-attention over positions. rotary: a pair of them counts by how far apart they are, too (`turned`)."""

    def __init__(self, channels: int, emb: int, heads: int, rotary: bool, ops: Any, **factory: Any):
        super().__init__(channels, emb, ops, **factory)
        self.heads, self.rotary = heads, rotary
        self.qkv = ops.Conv2d(channels, 3 * channels, 1, **factory)
        self.proj = ops.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, gate = self.modulate(x, emb)
        b, c, height, width = h.shape
        q, k, v = self.qkv(h).reshape(b, 3, self.heads, c // self.heads, -1).transpose(3, 4).unbind(1)
        if self.rotary:
            q, k = turned(q, height, width), turned(k, height, width)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)
        return x + gate * self.proj(h)


def turned(x: Tensor, height: int, width: int) -> Tensor:
    """Queries or keys (B x heads x height width x C) turned by their row and column (rotary embedding, Su et al. 2021).

    The product of two then depends on the rows and columns between them, whatever the picture's size. C: a multiple
    of 4. Half of the channels tell the row, half the column.
    """
    pairs = x.shape[-1] // 4
    frequencies = 100.0 ** (-torch.arange(pairs, device=x.device) / pairs)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij"
    )
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (rows, columns)], dim=1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class CrossAttention(Modulated):
    """Attention to a text's context (B x T x context_width)."""

    def __init__(self, channels: int, emb: int, heads: int, context_width: int, ops: Any, **factory: Any):
        super().__init__(channels, emb, ops, **factory)
        self.heads = heads
        self.q = ops.Conv2d(channels, channels, 1, **factory)
        self.kv = ops.Linear(context_width, 2 * channels, **factory)
        self.proj = ops.Conv2d(channels, channels, 1, **factory)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        h, gate = self.modulate(x, emb)
        b, c, height, width = h.shape
        q = self.q(h).reshape(b, self.heads, c // self.heads, -1).transpose(2, 3)
        k, v = self.kv(context.to(x.dtype)).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)
        return x + gate * self.proj(h)


class FeedForward(Modulated):
    def __init__(self, channels: int, emb: int, ops: Any, **factory: Any):
        super().__init__(channels, emb, ops, **factory)
        self.expand = ops.Conv2d(channels, 4 * channels, 1, **factory)
        self.contract = ops.Conv2d(4 * channels, channels, 1, **factory)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, gate = self.modulate(x, emb)
        return x + gate * self.contract(F.gelu(self.expand(h)))


class Stack(nn.ModuleList):
    """Blocks applied in order, each with the noise embedding, those that attend to a text with its context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, emb, context) if isinstance(block, CrossAttention) else block(x, emb)
        return x


class Denoiser(nn.Module):
    """Predict the clean picture from a noisy one.

    `forward(x, sigma, context)`: x is B x 3 x height x width in [-1, 1] plus noise, sigma is B in [0, 1], context
    B x T x context_width for a model with prompts; returns x0, like x.
    `ops` supplies Conv2d, Linear and GroupNorm (a host may pass layers that it can offload).
    """

    def __init__(self, config: DenoiserConfig = DenoiserConfig(), ops: Any = nn, **factory: Any):
        super().__init__()
        self.config, emb, c, w = config, config.width, config.outer_width, config.width
        self.embed = nn.Sequential(
            ops.Linear(128, emb, **factory), nn.SiLU(), ops.Linear(emb, emb, **factory), nn.SiLU()
        )
        self.conv_in = ops.Conv2d(3 * 16, c, 3, padding=1, **factory)
        self.encoder = ResBlock(c, emb, ops, **factory)
        self.down = ops.Conv2d(c, w, 3, stride=2, padding=1, **factory)
        self.position = nn.Parameter(torch.zeros(1, w, config.size // 8, config.size // 8, **factory))

        def transformer(depth: int, context_width: int = 0) -> Stack:
            layers = Stack()
            for _ in range(depth):
                layers.append(Attention(w, emb, config.heads, config.any_size, ops, **factory))
                if context_width:
                    layers.append(CrossAttention(w, emb, config.heads, context_width, ops, **factory))
                layers.append(FeedForward(w, emb, ops, **factory))
            return layers

        # Only here does a prompt enter: all that it asks for passes through this site, too.
        self.middle_block = transformer(config.middle_depth, config.context_width)
        self.after_middle = transformer(config.decoder_depth)
        self.up = ops.Conv2d(w, 4 * c, 1, **factory)
        self.decoder = Stack([ResBlock(c, emb, ops, **factory) for _ in range(2)])
        self.norm_out = ops.GroupNorm(8, c, **factory)
        self.conv_out = ops.Conv2d(c, 3 * 16, 3, padding=1, **factory)

    @property
    def dtype(self) -> torch.dtype:
        return self.position.dtype

    def encode(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Input of `middle_block` (B x width x height/8 x width/8) and noise embedding (B x width)."""
        emb = self.embed(noise_features(sigma).to(x.dtype))
        h = self.down(self.encoder(self.conv_in(F.pixel_unshuffle(x, 4)), emb))
        position = self.position.to(x.dtype)
        if position.shape[2:] != h.shape[2:]:  # as a picture would be resized
            position = F.interpolate(position, h.shape[2:], mode="bilinear")
        return h + position, emb

    def decode(self, h: Tensor, emb: Tensor) -> Tensor:
        """Clean picture from the output of `middle_block`."""
        h = F.pixel_shuffle(self.up(self.after_middle(h, emb)), 2)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(self.decoder(h, emb)))), 4)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        h, emb = self.encode(x, sigma)
        return self.decode(self.middle_block(h, emb, context), emb)


def noise_features(sigma: Tensor) -> Tensor:
    """Sinusoidal features (B x 128) of the noise level, as in Vaswani et al. 2017 with sigma scaled by 1000."""
    freqs = torch.exp(torch.arange(64, device=sigma.device) * (-math.log(10_000.0) / 64))
    angles = 1000.0 * sigma.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


TEXT = "text."  # what the names of a text encoder's weights begin with


def save_denoiser(path: str | Path, model: Denoiser, info: Mapping[str, Any], text: TextEncoder | None = None) -> None:
    """Write weights (fp16) with the sizes and `info`; with them the text encoder of a model with prompts."""
    weights = model.state_dict() | ({f"{TEXT}{name}": t for name, t in text.state_dict().items()} if text else {})
    settings = {"config": asdict(model.config), "info": dict(info)}
    if text:
        settings["text"] = {"words": text.words, "width": text.width, "length": text.length, "depth": len(text.layers)}
    save_tensors(path, "denoiser", {name: as_half(tensor) for name, tensor in weights.items()}, settings)


def load_denoiser_weights(path: str | Path) -> tuple[DenoiserConfig, dict[str, Tensor], TextEncoder | None]:
    """Sizes, fp32 weights and text encoder (None if it has no prompts) of a file that `save_denoiser` wrote.

    Raises `DiffLensError` if the file does not fit.
    """
    tensors, info = load_tensors(path, "denoiser", needs=["config"])
    with reading(path):
        refuse_whole_numbers(tensors)
        config = DenoiserConfig(**info["config"])
        check_sizes(config, tensors)
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in Denoiser(config).state_dict().items()}
            if config.context_width:
                check_depth(info["text"].get("depth", 0), tensors)  # left out: the default
                expected |= {f"{TEXT}{n}": t.shape for n, t in TextEncoder(**info["text"]).state_dict().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise DiffLensError(f"its weights do not fit a DiffLens denoiser ({', '.join(wrong[:3])}).")
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        text = None
        if config.context_width:
            text = TextEncoder(**info["text"]).eval().requires_grad_(False)
            text.load_state_dict({n[len(TEXT) :]: weights.pop(n) for n in [*weights] if n.startswith(TEXT)})
        return config, weights, text


def check_sizes(config: DenoiserConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` for sizes that no weight tells, and those that would take forever to build."""
    for size in (config.size, config.width, config.outer_width, config.heads):
        if type(size) is not int or size < 1:
            raise DiffLensError(f"it says a size of {size!r}, expected a positive whole number. The file is damaged.")
    for depth in (config.middle_depth, config.decoder_depth):
        check_depth(depth, tensors)
    if config.width % config.heads or (config.any_size and config.width // config.heads % 4):
        raise DiffLensError(f"its width of {config.width} cannot have {config.heads} heads. The file is damaged.")


def check_depth(depth: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` unless there can be so many layers, each of which has tensors of its own."""
    if type(depth) is not int or not 0 <= depth <= len(tensors):
        raise DiffLensError(f"it says {depth!r} layers and holds {len(tensors)} tensors. The file is damaged.")


def load_denoiser(path: str | Path) -> Denoiser:
    """The denoiser of a file, in fp32, ready to sample."""
    return load_prompted(path)[0]


def load_prompted(path: str | Path) -> tuple[Denoiser, TextEncoder | None]:
    """Denoiser and text encoder (None if it has no prompts) of a file, in fp32, ready to sample."""
    config, weights, text = load_denoiser_weights(path)
    model = Denoiser(config)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last), text  # type: ignore[call-overload]
