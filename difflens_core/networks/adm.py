"""The U-Net of guided-diffusion ("ADM", Dhariwal & Nichol 2021), which P2 (Choi et al. 2022) and others train too.

Written from the published architecture, with the names of its checkpoints. Blocks are run as modules, so that every
one of them, `middle_block` and `input_blocks.4` among them, is a site for a hook.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError

GROUPS = 32


@dataclass(frozen=True)
class AdmConfig:
    """Sizes of an `Adm`. The defaults are P2's for faces at 256 x 256 pixels.

    channels: width of each level, from the full size to the smallest. attention: the levels with attention, which the
    middle always has. `heads` counts where `head_channels` is 0. out_channels: twice in_channels with a learned sigma.
    """

    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 128
    channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    res_blocks: int = 1
    attention: tuple[int, ...] = (4,)
    head_channels: int = 64
    heads: int = 4
    new_attention_order: bool = False
    scale_shift: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    classes: int = 0


P2_FACES = AdmConfig()


class Resample(nn.Module):
    """Twice or half the height and width: nearest neighbour or mean, with a convolution of name `name` if asked."""

    def __init__(self, channels: int, up: bool, convolve: bool, ops: Any, **factory: Any):
        super().__init__()
        self.out_channels, self.up, self.name = channels, up, "conv" if up else "op"
        self.convolve = convolve
        if convolve:
            self.add_module(self.name, ops.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif not self.convolve:
            return F.avg_pool2d(x, 2)
        return getattr(self, self.name)(x) if self.convolve else x


class ResBlock(nn.Module):
    """Two convolutions beside a skip, with the noise embedding between them; may change the size on its way."""

    def __init__(
        self, config: AdmConfig, channels: int, out_channels: int, ops: Any, up: bool | None = None, **factory: Any
    ):
        super().__init__()
        self.out_channels, self.scale_shift, emb = out_channels, config.scale_shift, 4 * config.model_channels
        self.resample = None if up is None else Resample(channels, up, False, ops)
        self.in_layers = nn.Sequential(
            ops.GroupNorm(GROUPS, channels, **factory),
            nn.SiLU(),
            ops.Conv2d(channels, out_channels, 3, padding=1, **factory),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), ops.Linear(emb, (2 if config.scale_shift else 1) * out_channels, **factory)
        )
        self.out_layers = nn.Sequential(
            ops.GroupNorm(GROUPS, out_channels, **factory),
            nn.SiLU(),
            nn.Identity(),  # dropout, while training
            ops.Conv2d(out_channels, out_channels, 3, padding=1, **factory),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else ops.Conv2d(channels, out_channels, 1, **factory)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h, modulation = conv(h), self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Self-attention over positions. The orders differ in how the channels of `qkv` are laid out."""

    def __init__(self, config: AdmConfig, channels: int, ops: Any, **factory: Any):
        super().__init__()
        self.out_channels, self.new_order = channels, config.new_attention_order
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        self.norm = ops.GroupNorm(GROUPS, channels, **factory)
        self.qkv = ops.Conv1d(channels, 3 * channels, 1, **factory)
        self.proj_out = ops.Conv1d(channels, channels, 1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))
        layout = (3, self.heads) if self.new_order else (self.heads, 3)
        q, k, v = qkv.reshape(b, *layout, c // self.heads, -1).transpose(3, 4).unbind(1 if self.new_order else 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, -1)
        return x + self.proj_out(h).reshape(b, c, height, width)


class Block(nn.ModuleList):
    """Layers applied in order; those that want it get the noise embedding."""

    @property
    def out_channels(self) -> int:
        return self[-1].out_channels  # type: ignore[return-value]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Adm(nn.Module):
    """Predict what a noisy picture holds, usually its noise.

    `forward(x, timesteps, y)`: x is B x in_channels x H x W, H and W multiples of 2^(levels - 1); timesteps is B; y is
    B (int64), the classes of a class-conditional model. Returns B x out_channels x H x W, the prediction first and the
    learned variance after it. `ops` supplies the layers with weights (a host may pass layers that it can offload).
    """

    def __init__(self, config: AdmConfig = P2_FACES, ops: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        emb, levels = 4 * config.model_channels, range(len(config.channels))

        def layers(channels: int, width: int, level: int) -> list[nn.Module]:
            attention = [Attention(config, width, ops, **factory)] if level in config.attention else []
            return [ResBlock(config, channels, width, ops, **factory), *attention]

        def resample(width: int, up: bool) -> nn.Module:
            if config.resblock_updown:
                return ResBlock(config, width, width, ops, up, **factory)
            return Resample(width, up, config.conv_resample, ops, **factory)

        self.time_embed = nn.Sequential(
            ops.Linear(config.model_channels, emb, **factory), nn.SiLU(), ops.Linear(emb, emb, **factory)
        )
        if config.classes:
            self.label_emb = ops.Embedding(config.classes, emb, **factory)
        width = config.channels[0]
        self.input_blocks = nn.ModuleList([Block([ops.Conv2d(config.in_channels, width, 3, padding=1, **factory)])])
        skips = [width]
        for level in levels:
            for _ in range(config.res_blocks):
                self.input_blocks.append(Block(layers(width, config.channels[level], level)))
                width = config.channels[level]
                skips.append(width)
            if level != levels[-1]:
                self.input_blocks.append(Block([resample(width, up=False)]))
                skips.append(width)
        self.skip_channels = tuple(skips)
        self.middle_block = Block(
            [
                ResBlock(config, width, width, ops, **factory),
                Attention(config, width, ops, **factory),
                ResBlock(config, width, width, ops, **factory),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for index in range(config.res_blocks + 1):
                block = layers(width + skips.pop(), config.channels[level], level)
                width = config.channels[level]
                if level and index == config.res_blocks:
                    block.append(resample(width, up=True))
                self.output_blocks.append(Block(block))
        self.out = nn.Sequential(
            ops.GroupNorm(GROUPS, width, **factory),
            nn.SiLU(),
            ops.Conv2d(width, config.out_channels, 3, padding=1, **factory),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.get_parameter("out.0.weight").dtype

    def encode(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Input of `middle_block`, noise embedding (B x 4 model_channels) and what the decoder gets past it."""
        emb = self.time_embed(timestep_features(timesteps, self.config.model_channels).to(x.dtype))
        if self.config.classes:
            emb = emb + self.label_emb(y).to(x.dtype)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        return x, emb, skips

    def decode(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """What the network puts out, from the output of `middle_block`. Empties `skips`."""
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        h, emb, skips = self.encode(x, timesteps, y)
        return self.decode(self.middle_block(h, emb), emb, skips)


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B x width, fp32) of timesteps (B), as in Vaswani et al. 2017, the cosines first."""
    half = width // 2
    angles = timesteps.float()[:, None] * torch.exp(
        torch.arange(half, device=timesteps.device) * (-math.log(10_000.0) / half)
    )
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def infer_config(weights: Mapping[str, Tensor], heads: int = 0, new_attention_order: bool = False) -> AdmConfig:
    """The sizes that a checkpoint's weights tell.

    They do not tell the number of heads nor the attention's order. heads 0 stands for the habit of the trainers: 64
    channels a head in a network that changes size in its residual blocks (guided-diffusion, P2), 4 heads in others
    (improved-diffusion). Raises `DiffLensError` if the weights are not those of such a network.
    """
    try:
        config = _infer(weights)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise DiffLensError(f"not a complete ADM U-Net (looking for {error}).") from error
    each = 64 if config.resblock_updown and not heads else 0
    config = replace(config, head_channels=each, heads=heads or config.heads, new_attention_order=new_attention_order)
    for width in {config.channels[-1], *(config.channels[level] for level in config.attention)}:
        if width % (config.head_channels or config.heads):
            raise DiffLensError(
                f"attention over {width} channels cannot have {heads or 'its usual'} heads. Set heads to a number that "
                f"divides {width}."
            )
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Adm(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise DiffLensError(f"its weights do not fit an ADM U-Net ({', '.join(wrong[:3])}).")
    return config


def _infer(weights: Mapping[str, Tensor]) -> AdmConfig:
    def count(pattern: str) -> int:
        """One more than the largest number that the pattern's group matches in a name."""
        return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, weights) if m), default=-1)

    def has(pattern: str) -> bool:
        return any(map(re.compile(pattern).match, weights))

    blocks = count(r"output_blocks\.(\d+)\.")
    if blocks > len(weights):
        raise KeyError(f"the blocks before output_blocks.{blocks - 1}")
    # The last block of a level ends with what doubles the size. Of those that only repeat pixels no weight tells, but
    # then the blocks that halve the size have none either.
    resblock_updown = has(r"output_blocks\.\d+\.[12]\.in_layers")
    conv_resample = not resblock_updown and has(r"input_blocks\.\d+\.0\.op\.")
    if resblock_updown or conv_resample:
        last = next((i for i in range(blocks) if has(rf"output_blocks\.{i}\.[12]\.(in_layers|conv)\.")), blocks - 1)
    else:
        last = next((i for i in range(1, blocks) if not has(rf"input_blocks\.{i}\.")), blocks) - 1
    res_blocks = last
    levels = blocks // (res_blocks + 1)
    firsts = [1 + level * (res_blocks + 1) for level in range(levels)]
    channels = tuple(weights[f"input_blocks.{first}.0.in_layers.2.weight"].shape[0] for first in firsts)
    labels = weights.get("label_emb.weight")
    stem = weights["input_blocks.0.0.weight"]
    return AdmConfig(
        in_channels=stem.shape[1],
        out_channels=weights["out.2.weight"].shape[0],
        model_channels=weights["time_embed.0.weight"].shape[1],
        channels=channels,
        res_blocks=res_blocks,
        attention=tuple(i for i, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in weights),
        scale_shift=weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * channels[-1],
        resblock_updown=resblock_updown,
        conv_resample=conv_resample or resblock_updown,
        classes=0 if labels is None else labels.shape[0],
    )
