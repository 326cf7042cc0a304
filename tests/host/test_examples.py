"""The graphs that people start from, each with Steer put in: the right rows are changed, by the right numbers.

They are ComfyUI's own examples, on small random networks of their model's class, through the stock nodes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spy import Spy

PICTURES, STEPS, SEED = 3, 2, 5
SITES = {
    "SD1.5": "middle_block", "SDXL": "output_blocks.3.1", "Flux": "double_blocks.1", "Wan": "blocks.0",
    "Qwen-Image": "transformer_blocks.0",
}  # fmt: skip


def stock(module: str, name: str):
    """A node of ComfyUI's."""
    return getattr(importlib.import_module(module), name)


def ksampler(model, positive, negative, latent, cfg=3.0, denoise=1.0):
    return stock("nodes", "KSampler")().sample(
        model, SEED, STEPS, cfg, "euler", "normal", positive, negative, latent, denoise
    )[0]


def text_to_image(inside, family, model):
    """A prompt, a negative, an empty latent and a KSampler."""
    ksampler(model, inside.prompt(family, 1), inside.prompt(family, 2), inside.latent(family, PICTURES))


def flux(inside, family, model):
    """As its example has it: FluxGuidance, a guider without a negative, and the custom sampler."""
    custom, guided = "comfy_extras.nodes_custom_sampler", stock("comfy_extras.nodes_flux", "FluxGuidance")
    positive = guided.execute(inside.prompt(family, 1), 3.5).result[0]
    guider = stock(custom, "BasicGuider").execute(model, positive).result[0]
    sigmas = stock(custom, "BasicScheduler").execute(model, "simple", STEPS, 1.0).result[0]
    euler = stock(custom, "KSamplerSelect").execute("euler").result[0]
    noise = stock(custom, "RandomNoise").execute(SEED).result[0]
    stock(custom, "SamplerCustomAdvanced").execute(noise, guider, euler, sigmas, inside.latent(family, PICTURES))


def shifted(inside, family, model):
    """Qwen-Image's and Wan's examples shift the noise levels behind Steer."""
    name = "ModelSamplingAuraFlow" if family == "Qwen-Image" else "ModelSamplingSD3"
    patch = stock("comfy_extras.nodes_model_advanced", name)()
    (model,) = patch.patch_aura(model, 3.1) if family == "Qwen-Image" else patch.patch(model, 8.0)
    frames = 5 if family == "Wan" else 1
    latent = inside.latent(family, PICTURES, frames=frames)
    ksampler(model, inside.prompt(family, 1), inside.prompt(family, 2), latent)


def hires_fix(inside, family, model):
    """The pictures once more, larger."""
    prompts = inside.prompt(family, 1), inside.prompt(family, 2)
    first = ksampler(model, *prompts, inside.latent(family, PICTURES))
    (larger,) = stock("nodes", "LatentUpscale")().upscale(first, "bilinear", 256, 192, "disabled")
    ksampler(model, *prompts, larger, denoise=0.6)


def areas(inside, family, model):
    """Two prompts for halves of the picture, and one for all of it."""
    area, combine = stock("nodes", "ConditioningSetArea")(), stock("nodes", "ConditioningCombine")()
    (left,) = area.append(inside.prompt(family, 1), 128, 256, 0, 0, 1.0)
    (right,) = area.append(inside.prompt(family, 3), 128, 256, 128, 0, 1.0)
    (both,) = combine.combine(left, right)
    (positive,) = combine.combine(both, inside.prompt(family, 4))
    ksampler(model, positive, inside.prompt(family, 2), inside.latent(family, PICTURES, 32, 32))


def inpainting(inside, family, model):
    """A part of pictures drawn anew."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    latent = {"samples": torch.randn(PICTURES, 4, 16, 16, generator=torch.Generator().manual_seed(3))}
    (latent,) = stock("nodes", "SetLatentNoiseMask")().set_mask(latent, mask)
    ksampler(model, inside.prompt(family, 1), inside.prompt(family, 2), latent)


def lora(inside, family, model):
    """A LoRA behind Steer."""
    text_to_image(inside, family, inside.with_lora(model))


def control_net(inside, family, model):
    """A ControlNet, which adds to what the network's middle and its decoder put out."""
    from comfy.cldm.cldm import ControlNet as Network
    from comfy.controlnet import ControlNet

    sizes = inside.SMALL[family][1]
    names = ("num_res_blocks", "model_channels", "channel_mult", "context_dim", "transformer_depth", "image_size")
    network = Network(
        in_channels=4, hint_channels=3, use_spatial_transformer=True, num_heads=8, legacy=False,
        transformer_depth_middle=1, **{name: sizes[name] for name in names},
    ).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / max(1, weight[0].numel()) ** 0.5)
    control = ControlNet(network, load_device=torch.device("cpu"))
    positive, negative = stock("nodes", "ControlNetApplyAdvanced")().apply_controlnet(
        inside.prompt(family, 1), inside.prompt(family, 2), control, torch.rand(1, 128, 128, 3, generator=draw), 1.0,
        0.0, 1.0,
    )  # fmt: skip
    ksampler(model, positive, negative, inside.latent(family, PICTURES))


GRAPHS: dict[str, tuple[str, Callable]] = {
    "text to image with SD 1.5": ("SD1.5", text_to_image), "text to image with SDXL": ("SDXL", text_to_image),
    "Flux": ("Flux", flux), "Qwen-Image": ("Qwen-Image", shifted), "Wan": ("Wan", shifted),
    "hires fix": ("SD1.5", hires_fix), "areas": ("SD1.5", areas), "inpainting": ("SD1.5", inpainting),
    "LoRA": ("SD1.5", lora), "ControlNet": ("SD1.5", control_net),
}  # fmt: skip


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_graph_is_steered_as_asked_and_nothing_else_in_it_changes(inside, toys, graph):
    family, run = GRAPHS[graph]
    model, site, core = inside.model(family), SITES[family], inside.pack_module("difflens_core.steer")
    look = Spy(inside, site)
    with torch.inference_mode():
        run(inside, family, look.on(model))
    inside.forget()  # a LoRA's weights, too
    pick = min if graph == "hires fix" else max  # made at the size of the whole first picture
    _, width, *sides = pick((chunk.shape for _, _, chunk in look.chunks), key=math.prod)
    recipe = toys.recipe(
        width=width, positions=sides[0] * sides[1], steps=1, mode="move", strength=(2.0,) * 3, map=(*sides,)
    )
    recipe = replace(recipe, site=site, model="")
    before, after = Spy(inside, site), Spy(inside, site)
    node = inside.pack_module("nodes.steer").Steer
    steered, (dealt,) = node.execute(
        before.on(model), recipe, "uniform", 1.0, "from recipe", 0.0, 1.0, 0, 0, run=0
    ).result  # fmt: skip
    with torch.inference_mode():
        run(inside, family, after.on(steered))
    inside.forget()

    assert len(before.chunks) == len(after.chunks) == len(look.chunks) >= STEPS
    shapes, changed = {chunk.shape for _, _, chunk in before.chunks}, 0
    for (_, place, plain), (_, _, found) in zip(before.chunks, after.chunks, strict=True):
        if place:  # a negative
            assert torch.equal(plain, found)
            continue
        images = torch.arange(PICTURES).repeat_interleave(len(plain) // PICTURES)
        edit = core.Steering(recipe, dealt.of)
        torch.testing.assert_close(found, edit(plain, 0.0, images))
        assert all((found[images == number] != plain[images == number]).any() for number in range(PICTURES))
        changed += 1
    assert changed >= STEPS and len(shapes) == {"hires fix": 2, "areas": 2}.get(graph, 1)
    assert [numbers.tolist() for numbers in dealt.log.numbers] == [[*range(PICTURES)]] * (1 + (graph == "hires fix"))
    stretched = [sentence for sentence in dealt.log.said if "stretched" in sentence]
    assert dealt.log.said == stretched and bool(stretched) == (len(shapes) == 2)
    assert torch.equal(look.chunks[0][2], before.chunks[0][2]), "the first evaluation does not depend on the edit"
