"""ComfyUI and the pack in this process, on the CPU: no server. With the small random networks of the files beside it.

Import it only where a ComfyUI is at hand (the fixture `inside`); importing it puts ComfyUI on the path.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from environment import ensure_comfyui

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ensure_comfyui()))  # before the repository: ComfyUI has a module called nodes, too

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True  # before anything asks for the device

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import server  # noqa: E402, F401 (as all that ComfyUI itself has loaded before it loads packs)
from comfy.patcher_extension import CallbacksMP  # noqa: E402
from small_clips import random_clip, random_clip_vision  # noqa: E402
from small_networks import (  # noqa: E402
    FULL,
    SMALL,
    UNET,
    QuantizedTensor,
    latent,
    model,
    prompt,
    quantised_model,
    random_model,
    with_lora,
)

__all__ = [
    "CallbacksMP", "DiffLensError", "FULL", "IMPORT_SECONDS", "QuantizedTensor", "SMALL", "UNET", "comfy", "forget",
    "host", "latent", "model", "pack_module", "prompt", "quantised_model", "random_clip", "random_clip_vision",
    "random_model", "sample", "schedule", "with_lora",
]  # fmt: skip


def load_pack() -> ModuleType:
    """The pack as ComfyUI loads it, under a name of its own."""
    spec = importlib.util.spec_from_file_location("difflens_pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules["difflens_pack"] = pack
    spec.loader.exec_module(pack)
    return pack


began = time.process_time()
load_pack()
IMPORT_SECONDS = time.process_time() - began


def pack_module(name: str) -> ModuleType:
    """A module of the pack as it was loaded here; classes of its core are not those of `import difflens_core`."""
    return importlib.import_module(f"difflens_pack.{name}")


host = pack_module("nodes.host")
DiffLensError = pack_module("difflens_core.files").DiffLensError


def schedule(model: comfy.model_patcher.ModelPatcher, steps: int, sampler: str = "euler") -> list[float]:
    """Noise levels of a run, as `sample` draws it."""
    return comfy.samplers.KSampler(model, steps, "cpu", sampler, "normal").sigmas.tolist()


@torch.inference_mode()
def sample(
    model, positive, negative=None, cfg=1.0, latent=None, steps=1, sampler="euler", seed=0, noise=None
) -> torch.Tensor:  # fmt: skip
    """What a stock KSampler draws; one step of Euler is the network's first guess of the clean picture.

    After every step it looks whether Cancel was pressed, as the host's progress bar does.
    """
    start = latent["samples"]
    noise = comfy.sample.prepare_noise(start, seed) if noise is None else noise
    try:
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "normal", positive, negative or positive, start, disable_pbar=True,
            seed=seed, callback=lambda *_: comfy.model_management.throw_exception_if_processing_interrupted(),
        )  # fmt: skip
    finally:
        forget()


def forget() -> None:
    """Unload all models, while their patchers live: of dead ones ComfyUI looks for leaks, which takes long."""
    comfy.model_management.unload_all_models()
