"""Networks of diffusers sample as diffusers' own pipelines do, and the page on them runs as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from difflens_core.activations import Kept, Sampler, capture, noise_batches
from difflens_core.files import DiffLensError
from difflens_core.networks import DiffusersSampler, FlowSampler
from difflens_core.sae import TrainingOptions
from difflens_core.steer import Steering, save_directions

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def conditional() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval().requires_grad_(False)


def prompts(seed: int, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(seed))}


def guided() -> DiffusersSampler:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)  # as Stable Diffusion's; its pipeline sets them
    return DiffusersSampler(conditional(), scheduler, STEPS, prompts(3), prompts(4), 3.0, autoencoder())


@pytest.fixture(scope="module")
def sampler() -> DiffusersSampler:
    return guided()


def noise_of(sampler: Sampler, count: int) -> torch.Tensor:
    (noise,) = noise_batches(sampler.shape, count, 5, count)
    return noise


class Double:
    """An edit that notes how it was called."""

    site = "mid_block"

    def __init__(self):
        self.calls = []

    def __call__(self, h, progress, images):
        self.calls.append((round(progress, 3), images.tolist()))
        return 2 * h


def stable_diffusion(sampler: DiffusersSampler) -> tuple[StableDiffusionPipeline, dict]:
    """The pipeline of such a network, and the settings by which it draws two pictures as the sampler does."""
    pipe = StableDiffusionPipeline(
        sampler.vae, None, None, sampler.network, sampler.scheduler, None, None, requires_safety_checker=False
    )
    (positive,), (negative,) = sampler.positive.values(), sampler.negative.values()
    embeds = {"prompt_embeds": positive.expand(2, -1, -1), "negative_prompt_embeds": negative.expand(2, -1, -1)}
    return pipe, {"guidance_scale": sampler.cfg, "eta": 0.0, **embeds}


def test_guided_sampling_and_decoding_are_those_of_the_stable_diffusion_pipeline(sampler):
    pipe, settings = stable_diffusion(sampler)
    noise = noise_of(sampler, 2)
    latents = sampler.sample(noise, torch.arange(2))
    torch.testing.assert_close(drawn_by(pipe, noise, **settings), latents, atol=1e-4, rtol=1e-4)
    pictures = torch.from_numpy(drawn_by(pipe, noise, output_type="np", **settings))
    torch.testing.assert_close(pictures, sampler.decode(latents), atol=1e-4, rtol=1e-4)


def test_unconditional_sampling_is_that_of_the_ddim_pipeline(toys):
    network, scheduler = toys.unet2d(), DDIMScheduler()
    sampler = DiffusersSampler(network, scheduler, STEPS)
    pipe = DDIMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    expected = pipe(2, generator, num_inference_steps=STEPS, output_type="np").images
    found = sampler.decode(sampler.sample(noise_of(sampler, 2), torch.arange(2)))
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_pictures_do_not_depend_on_the_batch_and_follow_their_own_rows(scheduler):
    sampler = DiffusersSampler(conditional(), scheduler(), STEPS, prompts(6, rows=5), seed=9)
    noise = noise_of(sampler, 5)
    whole = sampler.sample(noise, torch.arange(5))
    order = torch.tensor([4, 1, 3])
    torch.testing.assert_close(sampler.sample(noise[order], order), whole[order], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sampler.sample(noise[order], torch.tensor([0, 1, 2])), whole[order], atol=1e-2)


def test_edits_and_capture_see_what_the_prompt_draws_alone(sampler):
    noise, images, edit = noise_of(sampler, 2), torch.tensor([3, 4]), Double()
    plain, kept = sampler.sample(noise, images), Kept("mid_block", [0, 2], torch.float32)
    assert not torch.allclose(sampler.sample(noise, images, [edit], [kept]), plain, atol=1e-3)
    assert edit.calls == [(round(progress, 3), [3, 4]) for progress in sampler.progress]
    assert (
        list(sampler.progress) == sorted(set(sampler.progress)) and 0 <= sampler.progress[0] < sampler.progress[-1] < 1
    )
    seen = []
    handle = sampler.network.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        first = sampler.started().timesteps[0]
        with torch.inference_mode():
            sampler.network(noise, first, prompts(3)["encoder_hidden_states"].expand(2, -1, -1))
    finally:
        handle.remove()
    torch.testing.assert_close(kept.taken()[0].movedim(-1, 1), seen[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(sampler.sample(noise, images), plain) and not sampler.network.mid_block._forward_hooks


def test_predicted_pictures_can_be_differentiated_by_the_prompts_half(sampler):
    noise, images, told = noise_of(sampler, 2), torch.arange(2), {}

    def look(step, h, pictures):
        (told[step],) = torch.autograd.grad(pictures[1, 2, 3, 0], h)
        assert pictures.shape[1:] == sampler.decode(sampler.sample(noise, images)).shape[1:]

    sampler.predict(noise, images, "mid_block", [1, STEPS - 1], look)
    assert [*told] == [1, STEPS - 1] and not told[1][0].any() and told[1][1].any()
    guided = told[STEPS - 1]
    replace(sampler, cfg=1.0).predict(noise, images, "mid_block", [0], look)
    assert not torch.equal(told[0], guided)
    with pytest.raises(DiffLensError, match="PNDMScheduler does not tell which picture"):
        replace(sampler, scheduler=PNDMScheduler()).predict(noise, images, "mid_block", [0], look)


def test_a_store_is_gone_on_with_by_the_same_sampler_alone(sampler, tmp_path):
    first = capture(sampler, 3, 1, 2, ["mid_block"], folder=tmp_path / "store")
    again = capture(sampler, 3, 1, 2, ["mid_block"], folder=tmp_path / "store", on_batch=pytest.fail)
    assert torch.equal(first.samples(), again.samples()) and first.activations().values.shape[:2] == (STEPS, 3)
    other = DiffusersSampler(sampler.network, sampler.scheduler, STEPS, prompts(7), sampler.negative, 3.0)
    with pytest.raises(ValueError, match="other settings"):
        capture(other, 3, 1, 2, ["mid_block"], folder=tmp_path / "store")


# --- the page ---


class Sides:
    """A classifier: which half of a picture is lighter?"""

    attributes = {"lighter": ("left", "right")}

    def classify(self, images):
        left, right = (half.mean(dim=(1, 2, 3)) for half in images.chunk(2, dim=2))
        return {"lighter": torch.stack([left - right, right - left], dim=1).mul(100).softmax(dim=1)}


def blocks() -> list[str]:
    """The two pieces of code in the page: what is set up for Stable Diffusion, and the way from there."""
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(found) == 2
    return found


def pipeline_folder(folder: Path) -> Path:
    """A whole Stable Diffusion pipeline as diffusers stores it, tiny and random, with a vocabulary of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        autoencoder(), CLIPTextModel(config), tokenizer, conditional(), DDPMScheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def follow(names: dict, out: Path) -> dict:
    """Run the second piece of code, with small sizes."""
    names |= {"pictures": 24, "out": out, "options": TrainingOptions(latents=64, k=8, steps=40, batch=256)}
    exec(compile(blocks()[1], "docs/diffusers.md", "exec"), names)
    return names


def check(names: dict, printed: str, out: Path) -> None:
    assert printed.startswith("Quality(fvu=") and "lighter, 16 pictures" in printed
    assert names["recipe"].classes == ("left", "right") and (out / "recipe.safetensors").is_file()
    assert not torch.equal(names["before"], names["after"]) and names["before"].shape == names["after"].shape
    assert names["numbers"]["after"]["success"] is not None
    assert len(blocks()[1].splitlines()) <= 48


def test_the_page_runs_on_stable_diffusion(tmp_path, capsys):
    pytest.importorskip("transformers")
    weights = ROOT / "models" / "avatars" / "difflens_classifiers" / "avatars.safetensors"
    names = {"folder": pipeline_folder(tmp_path / "made"), "weights": weights}
    exec(compile(blocks()[0], "docs/diffusers.md", "exec"), names)
    assert names["sampler"].cfg == 7.5 and "age" in names["classifier"].attributes
    names["classifier"] = Sides()
    capsys.readouterr()
    check(follow(names, tmp_path), capsys.readouterr().out, tmp_path)


def test_the_page_runs_on_an_unconditional_network(toys, tmp_path, capsys):
    names = {"sampler": DiffusersSampler(toys.unet2d(), DDIMScheduler(), STEPS), "classifier": Sides()}
    check(follow(names, tmp_path), capsys.readouterr().out, tmp_path)


def flux(guided: bool = True) -> FlowSampler:
    torch.manual_seed(3)
    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False)  # fmt: skip
    draw = torch.Generator().manual_seed(4)
    given = {
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=draw),
        "pooled_projections": torch.randn(1, 8, generator=draw),
    }
    given |= {"guidance": torch.tensor([3.5])} if guided else {}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FlowSampler(network, scheduler, STEPS, given, vae=autoencoder(), size=(4, 6))


def sd3() -> FlowSampler:
    torch.manual_seed(5)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4,
    ).eval().requires_grad_(False)  # fmt: skip
    draw = torch.Generator().manual_seed(6)
    prompts = [
        {"encoder_hidden_states": torch.randn(1, 5, 16, generator=draw),
         "pooled_projections": torch.randn(1, 8, generator=draw)} for _ in range(2)
    ]  # fmt: skip
    return FlowSampler(network, FlowMatchEulerDiscreteScheduler(shift=3.0), STEPS, *prompts, 4.0, autoencoder())


def drawn_by(pipe, noise: torch.Tensor, output_type: str = "latent", steps: int = STEPS, **settings) -> torch.Tensor:
    """What a pipeline draws from noise (2 x C x H x W)."""
    pipe.set_progress_bar_config(disable=True)
    packed = isinstance(pipe, FluxPipeline)
    latents = pipe._pack_latents(noise, *noise.shape) if packed else noise
    found = pipe(latents=latents, num_inference_steps=steps, output_type=output_type, **settings).images
    if packed:
        return pipe._unpack_latents(found, settings["height"], settings["width"], pipe.vae_scale_factor)
    return found


def flux_pipeline(sampler: FlowSampler) -> tuple[FluxPipeline, dict]:
    """As `stable_diffusion`."""
    pipe = FluxPipeline(sampler.scheduler, autoencoder(), None, None, None, None, sampler.network)
    given = sampler.positive
    height, width = (side * pipe.vae_scale_factor for side in sampler.size)
    return pipe, {
        "height": height, "width": width, "guidance_scale": 3.5,
        "prompt_embeds": given["encoder_hidden_states"].expand(2, -1, -1),
        "pooled_prompt_embeds": given["pooled_projections"].expand(2, -1),
    }  # fmt: skip


def test_sampling_flux_is_that_of_its_pipeline():
    sampler = flux()
    pipe, settings = flux_pipeline(sampler)
    noise = noise_of(sampler, 2)
    assert noise.shape == (2, 4, 4, 6)
    torch.testing.assert_close(
        sampler.sample(noise, torch.arange(2)), drawn_by(pipe, noise, **settings), atol=1e-4, rtol=1e-4
    )


def stable_diffusion_3(sampler: FlowSampler) -> tuple[StableDiffusion3Pipeline, dict]:
    """As `stable_diffusion`."""
    pipe = StableDiffusion3Pipeline(
        sampler.network, sampler.scheduler, autoencoder(), None, None, None, None, None, None
    )
    positive, negative = sampler.positive, sampler.negative
    height = sampler.shape[1] * pipe.vae_scale_factor
    return pipe, {
        "height": height, "width": height, "guidance_scale": sampler.cfg,
        "prompt_embeds": positive["encoder_hidden_states"].expand(2, -1, -1),
        "pooled_prompt_embeds": positive["pooled_projections"].expand(2, -1),
        "negative_prompt_embeds": negative["encoder_hidden_states"].expand(2, -1, -1),
        "negative_pooled_prompt_embeds": negative["pooled_projections"].expand(2, -1),
    }  # fmt: skip


def test_sampling_stable_diffusion_3_is_that_of_its_pipeline():
    sampler = sd3()
    pipe, settings = stable_diffusion_3(sampler)
    noise = noise_of(sampler, 2)
    expected = drawn_by(pipe, noise, **settings)
    torch.testing.assert_close(sampler.sample(noise, torch.arange(2)), expected, atol=1e-4, rtol=1e-4)


def sdxl() -> DiffusersSampler:
    torch.manual_seed(7)
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    ).eval().requires_grad_(False)  # fmt: skip
    draw, times = torch.Generator().manual_seed(8), torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    positive, negative = (
        {"encoder_hidden_states": torch.randn(1, 5, 16, generator=draw),
         "added_cond_kwargs": {"text_embeds": torch.randn(1, 12, generator=draw), "time_ids": times}} for _ in range(2)
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return DiffusersSampler(network, scheduler, STEPS, positive, negative, 3.0, autoencoder())


def sdxl_pipeline(sampler: DiffusersSampler) -> tuple[StableDiffusionXLPipeline, dict]:
    pipe = StableDiffusionXLPipeline(sampler.vae, None, None, None, None, sampler.network, sampler.scheduler)
    pipe.text_encoder_2 = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(projection_dim=12))
    size = {name: 8 * pipe.vae_scale_factor for name in ("height", "width")}
    settings = size | {"guidance_scale": sampler.cfg, "original_size": (16, 16), "target_size": (16, 16)}
    for prefix, given in (("", sampler.positive), ("negative_", sampler.negative)):
        settings[f"{prefix}prompt_embeds"] = given["encoder_hidden_states"].expand(2, -1, -1)
        settings[f"{prefix}pooled_prompt_embeds"] = given["added_cond_kwargs"]["text_embeds"].expand(2, -1)
    return pipe, settings


def test_sampling_sdxl_is_that_of_its_pipeline():
    sampler = sdxl()
    pipe, settings = sdxl_pipeline(sampler)
    noise = noise_of(sampler, 2)
    expected = drawn_by(pipe, noise, **settings)
    torch.testing.assert_close(sampler.sample(noise, torch.arange(2)), expected, atol=1e-4, rtol=1e-4)
    other = replace(sampler, positive=sampler.positive | {"added_cond_kwargs": {"text_embeds": torch.ones(1, 12)}})
    assert other.info["prompts"] != sampler.info["prompts"]


@dataclass
class OneToken:
    """An edit of the second token of the first row."""

    site: str

    def __call__(self, h, progress, images):
        changed = h.clone()
        changed[:, ::2, 0, 1] += 9  # not all channels, whose mean the next layer takes away
        return changed


@pytest.mark.parametrize("make", [flux, sd3])
def test_blocks_show_the_picture_of_a_transformer_as_a_map(make):
    """Where an edit writes there only the picture changes: one token there is four latents here."""
    sampler = make()
    noise, images = noise_of(sampler, 2), torch.arange(2)
    blocks = [name for name, _ in sampler.network.named_modules() if name.endswith("transformer_blocks.0")]
    for site in (*blocks, f"{blocks[0]} update"):
        kept = Kept(site, [0, STEPS - 1], torch.float32)
        steered = sampler.sample(noise, images, [OneToken(site)], [kept])
        grid = (sampler.shape[1] // 2, sampler.shape[2] // 2)
        assert kept.taken().shape == (2, 2, *grid, 32)
        moved = (steered - sampler.sample(noise, images)).abs().amax((0, 1))
        assert moved[0:2, 2:4].min() > 3 * moved[2:].median()


@pytest.mark.parametrize("make", [flux, sd3])
def test_transformers_tell_what_they_predict(make):
    sampler, told = make(), {}
    sampler.predict(
        noise_of(sampler, 2), torch.arange(2), "transformer_blocks.0", [0, STEPS - 1],
        lambda step, h, pictures: told.__setitem__(step, (h, pictures)),
    )  # fmt: skip
    assert sorted(told) == [0, STEPS - 1]
    h, pictures = told[0]
    (gradient,) = torch.autograd.grad(pictures.sum(), h)
    assert gradient.abs().max() > 0
    last = sampler.decode(sampler.sample(noise_of(sampler, 2), torch.arange(2)))
    torch.testing.assert_close(told[STEPS - 1][1].detach(), last, atol=1e-4, rtol=1e-4)


def test_a_part_of_a_block_with_tokens_of_text_is_refused():
    sampler = flux()
    kept = Kept("single_transformer_blocks.0.proj_out", [0])
    with pytest.raises(DiffLensError, match="11 tokens, the picture has 6.*Use a whole block"):
        sampler.sample(noise_of(sampler, 1), torch.arange(1), kept=[kept])


def test_flux_wants_a_size():
    with pytest.raises(DiffLensError, match="128 x 128 latents for 1024 pixels"):
        replace(flux(), size=None).shape  # noqa: B018


# --- docs/directions.md ---


def page_hook() -> Callable:
    """The function in the page, by its code there."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "directions.md").read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, "docs/directions.md", "exec"), names)
    return names["steer"]


@pytest.mark.parametrize(
    ("make", "pipeline_of", "site"),
    [
        (guided, stable_diffusion, "mid_block"),
        (guided, stable_diffusion, "down_blocks.1.attentions.0 update"),
        (sdxl, sdxl_pipeline, "mid_block"),
        (sd3, stable_diffusion_3, "transformer_blocks.1"),
        (flux, flux_pipeline, "transformer_blocks.0"),
        (flux, flux_pipeline, "single_transformer_blocks.0"),
    ],
)
def test_the_hook_in_the_page_draws_what_steering_draws(toys, tmp_path, make, pipeline_of, site):
    """At the steps of the capture and at others, in the part of the sampling that the recipe is for."""
    sampler = make()
    kept = Kept(site, [0], torch.float32)
    noise, images = noise_of(sampler, 2), torch.arange(2)
    plain = sampler.sample(noise, images, kept=[kept])
    height, width, channels = kept.taken().shape[2:]
    recipe = toys.recipe(steps=STEPS, width=channels, positions=height * width, start=0.2, end=0.8)
    known = replace(recipe.normalisation, progress=torch.tensor(sampler.progress))
    recipe = replace(recipe, site=site, normalisation=known, map=(height, width))
    written = save_directions(tmp_path / "d.safetensors", recipe)
    pipe, settings = pipeline_of(sampler)
    page_hook()(pipe, tmp_path / "d.safetensors", ["senior", "young"])
    try:
        drawn = {steps: drawn_by(pipe, noise, steps=steps, **settings) for steps in (STEPS, STEPS + 3)}
    finally:
        for module in sampler.network.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    for steps, found in drawn.items():
        edit = Steering(written, lambda images: torch.tensor([2, 0])[images])
        expected = replace(sampler, steps=steps).sample(noise, images, [edit])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[STEPS], plain, atol=1e-2)
