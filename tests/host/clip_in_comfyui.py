"""The Zero-shot Classifier on tiny random CLIPs of ComfyUI's own classes, against CLIP's formula step by step.

    python clip_in_comfyui.py COMFYUI_FOLDER

A program of its own: ComfyUI's modules must not meet those of the tests. It ends with an error if a check fails.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from launch_comfyui import install_mends  # noqa: E402

install_mends()
comfyui = sys.argv[1]
sys.path[:2] = [comfyui]
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.clip_vision  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer  # noqa: E402
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer  # noqa: E402
from comfy.text_encoders.sa_t5 import SAT5Model, SAT5Tokenizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "difflens_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
pack = sys.modules["difflens_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from difflens_pack.difflens_core.files import DiffLensError  # noqa: E402
from difflens_pack.nodes.classify import ZeroShot  # noqa: E402

CLASSES = "young: a small child | somebody young\nold: an (old) person"
TINY = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
TINY_T5 = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}


def random_weights(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for weight in (weight for weight in module.parameters() if weight.ndim):
        weight.copy_(torch.randn(weight.shape) * weight[0].numel() ** -0.5)


def text_model(model, tokenizer, width_l: int = 32, width_g: int = 48) -> comfy.sd.CLIP:
    configs = {"clip_l_model_config": {**TINY, "hidden_size": width_l}}
    configs |= {"clip_g_model_config": {**TINY, "hidden_size": width_g}, "t5base_model_config": TINY_T5}
    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=model, tokenizer=tokenizer), model_options=configs)
    random_weights(clip.cond_stage_model)
    return clip


def vision_model(width: int | None) -> comfy.clip_vision.ClipVisionModel:
    config = {**TINY, "image_size": 32, "patch_size": 16, "hidden_size": 24, "hidden_act": "quick_gelu"}
    config |= {"num_channels": 3, "model_type": "clip_vision_model"} | ({"projection_dim": width} if width else {})
    model = comfy.clip_vision.ClipVisionModel(config)
    random_weights(model.model)
    return model


def text_by_hand(encoder, tokens: list) -> torch.Tensor:
    """CLIP's text embedding: the last layer where the text ends, times the projection."""
    ids = torch.tensor([[token for token, _ in tokens[0]]])
    last = encoder.transformer.text_model(ids)[0].float()
    end = ids[0].tolist().index(49407)
    return (last[0, end] @ encoder.transformer.text_projection.weight.float().T)[None]


def picture_by_hand(vision, images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(vision.image_mean), torch.tensor(vision.image_std)
    pooled = vision.model.vision_model(((images - mean) / std).movedim(-1, 1))[2]
    return pooled.float() @ vision.model.visual_projection.weight.float().T


def check(name: str, clip, encoder, letter: str, width: int) -> None:
    """The node's classifier gives the softmax of a hundred cosines."""
    vision = vision_model(width)
    images = torch.randint(256, (5, 32, 32, 3), generator=torch.Generator().manual_seed(1)) / 255
    classifier = ZeroShot.execute(clip, vision, " age ", CLASSES).args[0]
    found = classifier.classify(images, batch=2)["age"]
    texts = []
    for prompts in (["a small child", "somebody young"], ["an old person"]):
        rows = [text_by_hand(encoder, clip.tokenize(prompt)[letter]).double() for prompt in prompts]
        texts.append(sum(row / row.norm() for row in rows) / len(rows))
    for i, picture in enumerate(picture_by_hand(vision, images).double()):
        cosines = [float(F.cosine_similarity(picture[None], text)) for text in texts]
        expected = 1 / (1 + math.exp(100 * (cosines[1] - cosines[0])))
        assert abs(float(found[i, 0]) - expected) < 2e-3, (name, i, found[i], expected)
        assert abs(cosines[0] - cosines[1]) > 1e-3, (name, cosines)
    assert classifier.attributes == {"age": ("young", "old")} and found.shape == (5, 2)
    assert clip.cond_stage_model.clip_l.execution_device is None, "the CLIP's options are as they were"
    torch.testing.assert_close(classifier.classify(images, batch=5)["age"], found, atol=1e-3, rtol=0)
    print(name, "ok")


def refused(clip, vision, *phrases: str, classes: str = CLASSES) -> None:
    try:
        ZeroShot.execute(clip, vision, "age", classes)
    except DiffLensError as error:
        assert str(error).startswith("Zero-shot Classifier: ") and all(p in str(error) for p in phrases), error
    else:
        raise AssertionError(f"not refused: {phrases}")


@torch.inference_mode()
def main() -> None:
    sd1, sdxl = text_model(SD1ClipModel, SD1Tokenizer), text_model(SDXLClipModel, SDXLTokenizer)
    check("SD1", sd1, sd1.cond_stage_model.clip_l, "l", 32)
    check("SDXL", sdxl, sdxl.cond_stage_model.clip_g, "g", 48)
    # why the option is needed: what ComfyUI gives by itself for SD1 has not been projected
    tokens = sd1.tokenize("an old person")
    pooled = sd1.encode_from_tokens(tokens, return_pooled=True)[1]
    assert (pooled - text_by_hand(sd1.cond_stage_model.clip_l, tokens["l"])).abs().max() > 0.1

    refused(sd1, vision_model(48), "32 numbers", "vision model's 48", "SDXL and CLIP-ViT-bigG-14 (1280)")
    refused(sd1, vision_model(None), "clip_vision_model", "shares no space", "Pairs that fit")
    refused(text_model(SAT5Model, SAT5Tokenizer), vision_model(32), "is no CLIP", "Pairs that fit")
    refused(sd1, vision_model(32), "got 1 classes", classes="young: a child")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v1-5.safetensors"
        sd1.patcher.cached_patcher_init = (None, (str(path),))
        save_file({"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(2)}, path)
        refused(sd1, vision_model(32), "v1-5.safetensors, which lacks CLIP's text projection", "Load CLIP")
        save_file({"text_projection.weight": torch.ones(2)}, path)
        ZeroShot.execute(sd1, vision_model(32), "age", CLASSES)
    print("refusals ok")


main()
