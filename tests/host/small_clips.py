"""Small random CLIPs of ComfyUI's own classes: the text halves of SD 1 and SDXL, a text encoder that is no CLIP, and
the picture half. `inside.py` hands them on.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.clip_vision
import comfy.sd
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy.text_encoders.sa_t5 import SAT5Model, SAT5Tokenizer

TINY = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
TEXT = {"SD1": (SD1ClipModel, SD1Tokenizer), "SDXL": (SDXLClipModel, SDXLTokenizer), "T5": (SAT5Model, SAT5Tokenizer)}
SIZES = {
    "clip_l_model_config": TINY | {"hidden_size": 32},
    "clip_g_model_config": TINY | {"hidden_size": 48},
    "t5base_model_config": {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1},
}


@torch.no_grad()
def set_random(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for weight in (weight for weight in module.parameters() if weight.ndim):
        weight.copy_(torch.randn(weight.shape) * weight[0].numel() ** -0.5)


def random_clip(kind: str) -> comfy.sd.CLIP:
    """A CLIP of TEXT; L's texts have 32 numbers, G's 48."""
    model, tokenizer = TEXT[kind]
    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=model, tokenizer=tokenizer), model_options=dict(SIZES))
    set_random(clip.cond_stage_model)
    return clip


def random_clip_vision(width: int | None) -> comfy.clip_vision.ClipVisionModel:
    """A CLIP_VISION whose embeddings have `width` numbers; without a width it is no CLIP."""
    config = {**TINY, "image_size": 32, "patch_size": 16, "hidden_size": 24, "hidden_act": "quick_gelu"}
    config |= {"num_channels": 3, "model_type": "clip_vision_model"} | ({"projection_dim": width} if width else {})
    model = comfy.clip_vision.ClipVisionModel(config)
    set_random(model.model)
    return model
