"""Small random pipelines of diffusers, of every kind that the commands sample, saved as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from difflens_core.networks import Denoiser, DenoiserConfig, save_denoiser

PROMPTLESS = ("avatars", "unconditional")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
U_NET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def autoencoder(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=channels, sample_size=8)


def clip(folder: Path, width: int, projected: bool = False) -> tuple:
    """A text encoder and its tokenizer, which knows letters."""
    folder.mkdir(exist_ok=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=width, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(config), CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5(width: int) -> tuple:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{letter}", -1.0) for letter in LETTERS)]
    config = T5Config(vocab_size=200, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5TokenizerFast(vocab=words, model_max_length=77)


def unconditional(folder: Path) -> DiffusionPipeline:
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return DDIMPipeline(
        UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, **types), DDIMScheduler()
    )


def sd15(folder: Path) -> DiffusionPipeline:
    encoder, tokenizer = clip(folder, 16)
    network = UNet2DConditionModel(cross_attention_dim=16, **U_NET)
    parts = (autoencoder(), encoder, tokenizer, network, DDIMScheduler(steps_offset=1, clip_sample=False), None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def sdxl(folder: Path) -> DiffusionPipeline:
    encoder, tokenizer = clip(folder, 16)
    other, other_tokenizer = clip(folder, 24, projected=True)
    network = UNet2DConditionModel(
        cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24, **U_NET,
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionXLPipeline(
        autoencoder(), encoder, other, tokenizer, other_tokenizer, network, scheduler, add_watermarker=False
    )


def sd3(folder: Path) -> DiffusionPipeline:
    encoder, tokenizer = clip(folder, 16, projected=True)
    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    texts = (encoder, tokenizer, clip(folder, 16, projected=True)[0], tokenizer, *t5(32))
    return StableDiffusion3Pipeline(network, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), *texts)


def flux(folder: Path) -> DiffusionPipeline:
    encoder, tokenizer = clip(folder, 16)
    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, autoencoder(), encoder, tokenizer, *t5(24), network)


def denoiser(folder: Path) -> Path:
    """One of the avatars' kind, in a file of its own."""
    model, draw = Denoiser(DenoiserConfig(size=16, width=32, outer_width=16, heads=2)), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in model.parameters():  # a fresh one begins as the identity
            weight.copy_(torch.randn(weight.shape, generator=draw) / max(1, weight[0].numel()) ** 0.5)
    save_denoiser(folder / "denoiser.safetensors", model, {})
    return folder / "denoiser.safetensors"


# Of each kind the pipeline, a site of it, and what a study says of it besides.
KINDS = {
    "avatars": (denoiser, "middle_block", {}),
    "unconditional": (unconditional, "mid_block", {}),
    "sd15": (sd15, "mid_block", {"cfg": 3.0, "negative": "bad"}),
    "sdxl": (sdxl, "mid_block", {"cfg": 3.0}),
    "sd3": (sd3, "transformer_blocks.0", {"cfg": 3.0}),
    "flux": (flux, "single_transformer_blocks.0", {"cfg": 3.0, "size": [16, 24]}),
}


def saved(kind: str, folder: Path) -> Path:
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    if kind == "avatars":
        return denoiser(folder)
    KINDS[kind][0](folder / "words").save_pretrained(folder / "model")
    return folder / "model"
