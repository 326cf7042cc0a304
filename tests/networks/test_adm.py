"""The ADM U-Net against one written another way, and its sizes inferred from its weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from difflens_core.activations import edit_site
from difflens_core.files import DiffLensError
from difflens_core.networks import Adm, AdmConfig
from difflens_core.networks.adm import P2_FACES, infer_config, timestep_features

PLAIN = AdmConfig(
    3, 3, 32, (32, 64), attention=(1,), head_channels=0, heads=2, scale_shift=False, resblock_updown=False
)
CONFIGS = {
    "as P2, small": AdmConfig(model_channels=32, channels=(32, 32, 64), attention=(2,), head_channels=32),
    "as improved-diffusion": replace(PLAIN, res_blocks=2),
    "no convolution in resampling": replace(PLAIN, channels=(32, 32, 64), conv_resample=False),
    "scale and shift, resampling apart": replace(PLAIN, scale_shift=True, attention=(0, 1)),
    "resampling in blocks, no scale": replace(PLAIN, resblock_updown=True, attention=(), res_blocks=2),
    "new attention order": replace(PLAIN, new_attention_order=True, heads=4),
    "classes and learned sigma": replace(PLAIN, out_channels=6, classes=5),
    "narrow first level": replace(PLAIN, model_channels=64, channels=(32, 64), resblock_updown=True),
    "one level": replace(PLAIN, channels=(64,), attention=(0,), res_blocks=2),
}


class Reference:
    """The published network as formulas over a state dict, knowing only the training options."""

    def __init__(self, weights: dict, config: AdmConfig):
        self.w, self.config = {name: tensor.double() for name, tensor in weights.items()}, config

    def conv(self, name, x, **how):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **how)

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        return scaled.reshape(x.shape) * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def residual(self, name, x, emb, change=lambda x: x):
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        h, x = self.conv(f"{name}.in_layers.2", change(h), padding=1), change(x)
        emb = F.silu(emb) @ self.w[f"{name}.emb_layers.1.weight"].T + self.w[f"{name}.emb_layers.1.bias"]
        emb = emb[:, :, None, None]
        if self.config.scale_shift:
            n = h.shape[1]
            h = self.norm(f"{name}.out_layers.0", h) * (1 + emb[:, :n]) + emb[:, n:]
        else:
            h = self.norm(f"{name}.out_layers.0", h + emb)
        if f"{name}.skip_connection.weight" in self.w:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(f"{name}.out_layers.3", F.silu(h), padding=1)

    def attend(self, name, x):
        b, c, *size = x.shape
        heads = self.config.heads if self.config.head_channels == 0 else c // self.config.head_channels
        width, flat = c // heads, self.norm(f"{name}.norm", x).reshape(b, c, -1)
        qkv = torch.einsum("oc,bcp->bop", self.w[f"{name}.qkv.weight"][..., 0], flat)
        qkv = qkv + self.w[f"{name}.qkv.bias"][:, None]
        out = []
        for head in range(heads):
            if self.config.new_attention_order:
                q, k, v = (qkv[:, part * c + head * width :][:, :width] for part in range(3))
            else:
                q, k, v = (qkv[:, (3 * head + part) * width :][:, :width] for part in range(3))
            share = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(width), dim=2)
            out.append(torch.einsum("bqk,bck->bcq", share, v))
        h = torch.einsum("oc,bcp->bop", self.w[f"{name}.proj_out.weight"][..., 0], torch.cat(out, dim=1))
        return x + (h + self.w[f"{name}.proj_out.bias"][:, None]).reshape(b, c, *size)

    def double(self, x):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def halve(self, x):
        return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))

    def __call__(self, x, timesteps, y=None):
        config, x = self.config, x.double()
        half = config.model_channels // 2
        angles = timesteps.double()[:, None] * 10_000 ** (-torch.arange(half).double() / half)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = F.silu(emb @ self.w["time_embed.0.weight"].T + self.w["time_embed.0.bias"])
        emb = emb @ self.w["time_embed.2.weight"].T + self.w["time_embed.2.bias"]
        if config.classes:
            emb = emb + self.w["label_emb.weight"][y]
        h = self.conv("input_blocks.0.0", x, padding=1)
        skips, number = [h], 1
        for level in range(len(config.channels)):
            for _ in range(config.res_blocks):
                h = self.residual(f"input_blocks.{number}.0", h, emb)
                h = self.attend(f"input_blocks.{number}.1", h) if level in config.attention else h
                skips, number = [*skips, h], number + 1
            if level < len(config.channels) - 1:
                if config.resblock_updown:
                    h = self.residual(f"input_blocks.{number}.0", h, emb, self.halve)
                elif config.conv_resample:
                    h = self.conv(f"input_blocks.{number}.0.op", h, stride=2, padding=1)
                else:
                    h = self.halve(h)
                skips, number = [*skips, h], number + 1
        h = self.residual("middle_block.0", h, emb)
        h = self.residual("middle_block.2", self.attend("middle_block.1", h), emb)
        number = 0
        for level in reversed(range(len(config.channels))):
            for index in range(config.res_blocks + 1):
                h = self.residual(f"output_blocks.{number}.0", torch.cat([h, skips.pop()], dim=1), emb)
                h = self.attend(f"output_blocks.{number}.1", h) if level in config.attention else h
                if level and index == config.res_blocks:
                    name = f"output_blocks.{number}.{2 if level in config.attention else 1}"
                    if config.resblock_updown:
                        h = self.residual(name, h, emb, self.double)
                    else:
                        h = self.double(h)
                        h = self.conv(f"{name}.conv", h, padding=1) if config.conv_resample else h
                number += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), padding=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_pass_is_the_published_one(toys, name):
    config = CONFIGS[name]
    model = toys.adm(config)
    x, timesteps = toys.random(1)(2, 3, 8, 12), torch.tensor([0.0, 871.0])
    y = torch.tensor([4, 1]) if config.classes else None
    found, expected = model(x, timesteps, y), Reference(model.state_dict(), config)(x, timesteps, y)
    assert found.shape == (2, config.out_channels, 8, 12) and float(expected.std()) > 0.1
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_inferred_from_the_weights(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        weights = Adm(config).state_dict()
    found = infer_config(weights, heads=1, new_attention_order=config.new_attention_order)
    # A convolution in what resamples tells nothing where there is no such thing.
    told = not config.resblock_updown and len(config.channels) > 1
    unknown = {"head_channels": config.head_channels, "heads": config.heads}
    unknown |= {} if told else {"conv_resample": config.conv_resample}
    assert replace(found, **unknown) == config


def test_p2_for_faces_is_recognised_with_the_settings_that_its_weights_do_not_tell():
    with torch.device("meta"):
        model = Adm(P2_FACES)
    assert infer_config(model.state_dict()) == P2_FACES
    assert (model.middle_block.out_channels, model.middle_block[1].heads) == (512, 8)
    with torch.device("meta"):
        assert infer_config(Adm(PLAIN).state_dict(), heads=0) == replace(PLAIN, heads=4)


def test_what_does_not_fit_is_refused(toys):
    weights = toys.adm(PLAIN).state_dict()
    with pytest.raises(DiffLensError, match="do not fit an ADM U-Net .middle_block.1.qkv.weight"):
        infer_config(weights | {"middle_block.1.qkv.weight": torch.zeros(3, 64, 1)})
    with pytest.raises(DiffLensError, match="not a complete ADM U-Net .looking for 'out.2.weight'"):
        infer_config({name: tensor for name, tensor in weights.items() if not name.startswith("out.")})
    with pytest.raises(DiffLensError, match="64 channels cannot have 3 heads. Set heads to a number that divides 64"):
        infer_config(weights, heads=3)


def test_every_block_is_a_site(toys):
    """Also those that ComfyUI's own UNet never calls as modules."""
    model, x, t = toys.adm(CONFIGS["as P2, small"]), toys.random(2)(1, 3, 8, 8), torch.tensor([5.0])
    before = model(x, t)
    for site in ("input_blocks.2", "input_blocks.5.1", "middle_block", "middle_block.1", "output_blocks.3"):
        with edit_site(model, site, lambda h: h * 0.5):
            assert not torch.equal(model(x, t), before)
        assert torch.equal(model(x, t), before)
    h, emb, skips = model.encode(x, t)
    assert torch.equal(model.decode(model.middle_block(h, emb), emb, skips), before) and skips == []


def test_timestep_features_of_an_odd_width_end_with_a_zero():
    assert timestep_features(torch.tensor([3.0]), 5)[0, -1] == 0
