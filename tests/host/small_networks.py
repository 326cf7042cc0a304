"""Small random networks of every family that we support, as MODELs, and what they are sampled from.

`inside.py` puts ComfyUI on the path before it imports this file, and hands all of it on.
"""

from __future__ import annotations

import functools
import json

import comfy.model_patcher
import comfy.supported_models as families
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

UNET = {
    "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2], "use_spatial_transformer": True,
    "model_channels": 32, "channel_mult": [1, 2, 2, 2], "context_dim": 16, "transformer_depth_middle": 1,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "image_size": 32,
    "legacy": False, "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
XL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2, "adm_in_channels": 2816,
    "use_linear_in_transformer": True, "num_classes": "sequential",
}  # fmt: skip
SHORT = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
}  # fmt: skip
CLIPS = XL | {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4,
    "transformer_depth_middle": 1, "model_channels": 64, "in_channels": 8, "adm_in_channels": 768,
    "use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.5, "video_kernel_size": [3, 1, 1],
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "n_layers": 2, "n_refiner_layers": 2,
    "n_heads": 2, "n_kv_heads": 1, "multiple_of": 16, "qk_norm": True, "cap_feat_dim": 16, "axes_dims": [8, 8, 8],
    "axes_lens": [64, 64, 64],
}  # fmt: skip
# Of each family a class of configurations, its sizes and the channels of its latents. Prompts are 16 wide.
SMALL = {
    "SD1.5": (families.SD15, UNET, 4),
    "SDXL": (families.SDXL, UNET | XL, 4),
    "U-Net": (families.SD15, UNET | SHORT, 4),
    "SVD": (families.SVD_img2vid, UNET | CLIPS, 4),
    "Flux": (
        families.Flux,
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
            "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
            "axes_dim": [8, 8, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
            "txt_ids_dims": [],
        },
        16,
    ),
    "SD3": (
        families.SD3,
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 3,
            "adm_in_channels": 8, "pos_embed_max_size": 16, "num_patches": 256, "pos_embed_scaling_factor": None,
            "qk_norm": "rms", "x_block_self_attn_layers": [0, 1],
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}
            },
        },
        16,
    ),
    "Qwen-Image": (
        families.QwenImage,
        {
            "image_model": "qwen_image", "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 2,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 8, 8),
        },
        16,
    ),
    "Wan": (
        families.WAN21_T2V,
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2,
            "text_dim": 16, "text_len": 8, "freq_dim": 32,
        },
        16,
    ),
    "Lumina": (families.Lumina2, LUMINA, 16),
    "Z-Image": (
        families.ZImage,
        LUMINA | {
            "z_image_modulation": True, "pad_tokens_multiple": 32, "time_scale": 1000.0, "dim": 288, "n_heads": 12,
        },
        16,
    ),
    "HunyuanVideo": (
        families.HunyuanVideo,
        {
            "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8,
            "context_in_dim": 16, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
            "depth_single_blocks": 2, "axes_dim": [8, 8, 8], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True,
            "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
            "vision_in_dim": None, "meanflow_sum": False,
        },
        16,
    ),
}  # fmt: skip
# The sizes of the true architectures, where they are others.
FULL = {
    "SD1.5": UNET | {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "context_dim": 768},
    "SDXL": UNET | XL | {
        "model_channels": 320, "channel_mult": [1, 2, 4], "context_dim": 2048, "transformer_depth_middle": 10,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}  # fmt: skip
POOLED = {"SDXL": 1280, "Flux": 8, "SD3": 8, "HunyuanVideo": 8}
VIDEO = ("Qwen-Image", "Wan", "HunyuanVideo")  # their latents have frames


@functools.cache
def model(family: str) -> comfy.model_patcher.ModelPatcher:
    """The tiny MODEL of a family, with random weights. Change clones of it only."""
    return random_model(SMALL[family][0], SMALL[family][1])


def random_model(
    make: type, sizes: dict, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with random weights, of a class of configurations and sizes; cast: what it computes in, if not dtype."""
    config = make(sizes)
    config.set_inference_dtype(dtype, cast)
    network = config.get_model({}, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (*network.diffusion_model.parameters(), *network.diffusion_model.buffers()):
            weight.copy_(torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel()) ** 0.5)
    return patcher_of(network)


def quantised_model(family: str, form: str) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of a family with its linear layers quantised, as ComfyUI loads such a checkpoint; form: its name."""
    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    told = torch.tensor([*json.dumps({"format": form}).encode()], dtype=torch.uint8)
    plain = model(family).model.diffusion_model
    weights = plain.state_dict()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            weights |= QuantizedTensor.from_float(module.weight.data, layout).state_dict(f"{name}.weight")
            weights[f"{name}.comfy_quant"] = told
    config = SMALL[family][0](SMALL[family][1])
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    network = config.get_model({}, device=torch.device("cpu"))
    network.load_model_weights(weights, "")
    return patcher_of(network)


def patcher_of(network: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    network.eval()
    return comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def with_lora(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone with random differences on the weights of its linear layers."""
    clone, draw, weights = model.clone(), torch.Generator().manual_seed(4), model.model.state_dict()
    names = [name for name, weight in weights.items() if name.startswith("diffusion_model.") and weight.ndim == 2]
    patches = {
        name: ("diff", (0.3 * weights[name].std() * torch.randn(weights[name].shape, generator=draw),))
        for name in names
    }
    assert len(clone.add_patches(patches)) == len(names) > 2
    return clone


def prompt(family: str, seed: int, tokens: int = 8, width: int = 16) -> list:
    """A CONDITIONING of random numbers that the family's network takes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    more = {}
    if family in POOLED:
        more["pooled_output"] = torch.randn(1, POOLED[family], generator=generator)
    return [[torch.randn(1, tokens, width, generator=generator), more]]


def latent(family: str, batch: int = 2, height: int = 16, width: int = 16, frames: int = 1) -> dict:
    """An empty LATENT."""
    between = (frames,) if family in VIDEO else ()
    return {"samples": torch.zeros(batch, SMALL[family][2], *between, height, width)}
