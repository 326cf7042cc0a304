"""What steering never changes, in every family of models that we support.

In this process, on small random networks (`inside.py`), through the node Steer with a recipe of random directions.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from difflens_core.networks import AdmConfig, TextEncoder, save_denoiser
from difflens_core.steer import Recipe

STEPS, CFG = 2, 3.0
PICTURES = (0, 1, 2)
# Of every family a site that ComfyUI's own patches reach, where there is one, and one that a hook reaches.
SITES = {
    "avatars": ("middle_block", "after_middle.0"),
    "avatars at work": ("middle_block", "decoder.1 update"),
    "ADM": ("middle_block", "output_blocks.3.0"),
    "UNet2D": ("middle_block", "up_blocks.1.resnets.0"),
    "SD1.5": ("mid_block", "down_blocks.2.attentions.1 update"),
    "SDXL": ("mid_block", "up_blocks.0.attentions.1 update"),
    "SDXL in two calls": ("mid_block", "output_blocks.3.1"),  # two prompts, and a negative of another length
    "Flux": ("transformer_blocks.1", "single_blocks.0 update"),
    "SD3": ("joint_blocks.1", "joint_blocks.0 update"),
    "Qwen-Image": ("transformer_blocks.0", "transformer_blocks.1 update"),
    "Wan": ("blocks.0", "blocks.1 update"),
}
CASES = [(family, site) for family, sites in SITES.items() for site in sites]


@dataclass
class Given:
    """A model, what it is sampled from (a latent of one picture), and a recipe for a site of it."""

    inside: ModuleType
    model: object
    positive: list
    negative: list
    latent: torch.Tensor
    recipe: Recipe | None = None

    def steer(self, model=None, strength: float = 1.0, conditioning: str = "positive", pictures=PICTURES):
        """The model behind Steer. Picture k is asked for class k."""
        targets = self.inside.pack_module("difflens_core.targets").Targets(
            self.recipe.attribute, self.recipe.classes, (1 / 3,) * 3,
            asked=np.array(pictures) % 3, moved=np.ones(len(pictures), bool),
        )  # fmt: skip
        node = self.inside.pack_module("nodes.steer").Steer
        return node.execute(
            model or self.model, self.recipe, "uniform", strength, "from recipe", 0.0, 1.0, 0, 0, conditioning,
            targets=(targets,),
        ).result[0]  # fmt: skip

    def draw(self, model=None, positive=None, negative=None, cfg=CFG, pictures=PICTURES, steps=STEPS) -> torch.Tensor:
        """Those pictures, each from noise of its own."""
        noise = [torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(k)) for k in pictures]
        latent = {"samples": self.latent.repeat(len(pictures), *[1] * (self.latent.ndim - 1))}
        return self.inside.sample(
            model or self.model, positive or self.positive, negative or self.negative, cfg, latent, steps,
            noise=torch.cat(noise),
        )  # fmt: skip

    @property
    def hooks(self) -> int:
        modules = self.model.model.diffusion_model.modules()
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def on_pixels(inside, toys, family: str, folder) -> Given:
    """A model that draws pixels: ours, or one of another program as a file of it."""
    host, nothing = inside.host, inside.host.unconditional_conditioning()
    if family == "avatars":
        save_denoiser(folder / "denoiser.safetensors", toys.denoiser(), {})
        model = host.load_unconditional(str(folder / "denoiser.safetensors"))
        return Given(inside, model, nothing, nothing, torch.zeros(1, 3, 16, 16))
    if family == "avatars at work":
        torch.manual_seed(9)
        text = TextEncoder(("doctor", "nurse"), width=16, length=4).eval()
        save_denoiser(folder / "prompted.safetensors", toys.denoiser(context_width=16), {}, text)
        model, clip = host.load_prompted(str(folder / "prompted.safetensors"))
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("a doctor", "")]
        return Given(inside, model, *prompts, torch.zeros(1, 3, 16, 16))
    if family == "ADM":
        small = AdmConfig(
            model_channels=32, channels=(32, 64), attention=(2,), head_channels=0, heads=4, resblock_updown=False,
            classes=3,
        )  # fmt: skip
        torch.save(toys.adm(small).state_dict(), folder / "adm.pt")
        model, _, classes = host.load_model(str(folder / "adm.pt"), "linear", "sample")
        return Given(
            inside, model, host.class_conditioning(0, classes), host.class_conditioning(1, classes),
            torch.zeros(1, 3, 16, 16),
        )  # fmt: skip
    toys.unet2d().save_pretrained(folder / "unet2d")
    DDIMScheduler(prediction_type="sample").save_pretrained(folder / "unet2d")
    model, *_ = host.load_model(str(folder / "unet2d"))
    return Given(inside, model, nothing, nothing, torch.zeros(1, 3, 16, 16))


def on_latents(inside, family: str) -> Given:
    """A small network of ComfyUI's own classes."""
    name = family.partition(" in ")[0]
    positive, negative = inside.prompt(name, 1), inside.prompt(name, 2)
    if name != family:
        positive, negative = positive + inside.prompt(name, 3), inside.prompt(name, 2, tokens=15)
    return Given(inside, inside.model(name), positive, negative, inside.latent(name, 1)["samples"])


@pytest.fixture(scope="module")
def models(inside, toys, tmp_path_factory) -> dict[str, Given]:
    folder = tmp_path_factory.mktemp("pixels")
    return {
        family: on_latents(inside, family) if family.partition(" in ")[0] in inside.SMALL
        else on_pixels(inside, toys, family, folder)
        for family in SITES
    }  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def given(models, toys, request) -> Given:
    """The model of a family, with a recipe that fits what its site puts out."""
    family, site = request.param
    found, shapes = models[family], []

    def look(h, progress, images):
        shapes.append(h.shape)
        return h

    found.draw(found.inside.host.apply_site(found.model, site, look, "Look"), steps=1)
    _, width, *sides = shapes[0]
    recipe = toys.recipe(width=width, positions=sides[0] * sides[1], mode="move", strength=(2.0,) * 3)
    return replace(found, recipe=replace(recipe, site=site, model=""))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of another batch, measured by the spread of what is expected."""
    spread = float(expected.std())
    torch.testing.assert_close(found, expected, atol=4e-3 * spread, rtol=4e-3)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether every picture is another one, by far more than `close` allows."""
    return bool(((one - other).abs().flatten(1).amax(dim=1) > 0.02 * other.std()).all())


def test_strength_0_is_no_node_to_the_bit_and_the_model_that_came_in_stays(given):
    plain = given.draw()
    assert torch.equal(given.draw(given.steer(strength=0.0)), plain)
    steered = given.draw(given.steer())
    assert differ(steered, plain) and steered.isfinite().all()
    assert torch.equal(given.draw(), plain) and not given.hooks


def test_the_size_and_the_order_of_a_batch_change_nothing(given):
    together = given.draw(given.steer())
    for pictures in ((2, 1), (0,)):
        close(given.draw(given.steer(pictures=pictures), pictures=pictures), together[list(pictures)])
    assert differ(given.draw(given.steer(pictures=(1, 2, 0))), together), "every class is another"


@pytest.mark.parametrize("conditioning", ["positive", "negative", "both"])
def test_only_the_conditioning_asked_for_is_steered(given, conditioning):
    """After one step of Euler the picture is negative + cfg (mean of the positives - negative)."""

    def alone(prompt, steered: bool) -> torch.Tensor:
        return given.draw(given.steer() if steered else None, [prompt], cfg=1.0, steps=1)

    positives = [alone(prompt, conditioning in ("positive", "both")) for prompt in given.positive]
    negative = alone(given.negative[0], conditioning in ("negative", "both"))
    found = given.draw(given.steer(conditioning=conditioning), steps=1)
    close(found, negative + CFG * (sum(positives) / len(positives) - negative))
    assert differ(found, given.draw(steps=1))


def test_a_lora_stays(given):
    lora = given.inside.with_lora(given.model)
    plain, steered = given.draw(lora), given.draw(given.steer(lora))
    assert differ(plain, given.draw()) and differ(steered, plain) and differ(steered, given.draw(given.steer()))
    assert torch.equal(given.draw(given.steer(lora, strength=0.0)), plain)
    assert torch.equal(given.draw(given.inside.with_lora(given.steer())), steered), "the order of the nodes"


@contextmanager
def loaded_in_inference_mode(model):
    """The network's weights as a node has them that loads in inference mode, which cannot be differentiated through."""
    own = [
        (tensors, name, tensor)
        for module in model.model.diffusion_model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    with torch.inference_mode():
        for tensors, name, tensor in own:
            copy = tensor.detach().clone()
            tensors[name] = torch.nn.Parameter(copy, False) if isinstance(tensor, torch.nn.Parameter) else copy
    yield
    for tensors, name, tensor in own:
        assert tensors[name].is_inference(), "the weights that were there are there again"
        tensors[name] = tensor


def test_predicted_pictures_can_be_differentiated_by_what_the_site_puts_out(given):
    """Along its own direction the slope is that of two predictions beside it, under guidance."""
    inside, site, vae = given.inside, given.recipe.site, given.inside.host.pixel_space_vae()
    start = {"samples": given.latent.repeat(2, *[1] * (given.latent.ndim - 1))}
    noise = 0.3 * torch.randn(start["samples"].shape, generator=torch.Generator().manual_seed(3))
    directions, slopes = [], []

    def picture(model, look=None) -> float:
        found = []

        def on_prediction(step, h, pictures):
            weights = torch.linspace(-1, 1, pictures[1].numel(), dtype=torch.float64).reshape(pictures[1].shape)
            value = (weights * pictures[1]).sum()
            found.append(float(value.detach()))
            if look:
                look(h, value)

        sampler = inside.host.HostSampler(
            model, given.positive, start, 1, "euler", "normal", 0, given.negative, CFG, vae, "Look"
        )
        with torch.inference_mode(), loaded_in_inference_mode(given.model):
            sampler.predict(noise, torch.arange(2), site, [0], on_prediction)
        inside.forget()
        return found[0]

    def slope(h, value):
        (gradient,) = torch.autograd.grad(value, h)
        assert not gradient[0].any(), "another picture"
        directions.append(gradient[1] / gradient[1].norm())
        slopes.append(float(gradient[1].norm()))

    plain = picture(given.model, slope)
    assert slopes[0] > 0 and plain == picture(given.model)

    def nudged(sign: int) -> float:
        def nudge(h, progress, images):
            return torch.cat([h[:1], h[1:] + sign * 1e-2 * directions[0]])

        return picture(inside.host.apply_site(given.model, site, nudge, "Nudge"))

    assert (nudged(1) - nudged(-1)) / 2e-2 == pytest.approx(slopes[0], rel=0.15)  # pixels reach black or white
    assert not given.hooks and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("end", ["an error", "Cancel"])
def test_the_model_is_as_before_when_a_run_ends_early(given, end):
    """In its second step, with the weights of a LoRA in the network."""
    inside, steered = given.inside, given.steer(given.inside.with_lora(given.model))
    plain, before, seen = given.draw(), given.draw(steered), []

    def stop(h, progress, images):
        seen.append(progress)
        if progress > seen[0]:
            if end == "an error":
                raise ZeroDivisionError
            inside.comfy.model_management.interrupt_current_processing()
        return h

    expected = ZeroDivisionError if end == "an error" else inside.comfy.model_management.InterruptProcessingException
    with pytest.raises(expected):
        given.draw(inside.host.apply_site(steered, given.recipe.site, stop, "Stop"), steps=4)
    assert 1 < len({*seen}) < 4 and not given.hooks
    assert torch.equal(given.draw(), plain) and torch.equal(given.draw(steered), before)
