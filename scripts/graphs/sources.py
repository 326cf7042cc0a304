"""Files that workflows ask for and that do not come with the pack: which folder of models, and where they are from."""

from __future__ import annotations

FAIRFACE = "res34_fair_align_multi_7_20190809.pt"
P2 = "celebahq_p2.pt"
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
YUNET = "yunet_final.pth"
PAPER = "https://github.com/foundation-model-research/DiffLens"  # the SAEs and features, and how to get them

SOURCES = {
    FAIRFACE: ("difflens_classifiers", "https://github.com/dchen236/FairFace"),
    P2: ("difflens_models", "https://github.com/jychoi118/P2-weighting"),
    SD15: (
        "checkpoints",
        "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    ),
    YUNET: ("difflens_classifiers", "https://github.com/kornia/data/raw/main/yunet_final.pth"),
}


def models_of(values: list) -> list[dict]:
    """Those among a node's values, as ComfyUI's page wants to know of them."""
    named = [value for value in values if isinstance(value, str) and value in SOURCES]
    return [{"name": name, "directory": SOURCES[name][0], "url": SOURCES[name][1]} for name in named]


def bring(name: str, what: str) -> str:
    """A line of a note: the file, where it belongs, where it is from."""
    folder, url = SOURCES[name]
    return f"- *models/{folder}/{name}*: [{what}]({url})\n"
