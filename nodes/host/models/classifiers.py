"""Classifiers on the device that ComfyUI computes on, and ComfyUI's own CLIP models as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from safetensors import safe_open
from torch import Tensor, nn

from ....difflens_core.activations import differentiable
from ....difflens_core.classifiers import frames_of, join_readings
from ....difflens_core.files import DiffLensError

BATCH = 16


class HostedClassifier:
    """A classifier that ComfyUI brings to its device for every use, and takes away when it needs the memory."""

    def __init__(self, classifier: nn.Module):
        self.classifier, self.attributes = classifier, classifier.attributes
        device = comfy.model_management.get_torch_device()
        offload = comfy.model_management.unet_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(classifier, load_device=device, offload_device=offload)

    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """See `ImageClassifier.classify`; Cancel works between batches."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        parts = []
        for batch in images.split(BATCH):
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts.append(self.classifier.classify(batch))
        return join_readings(parts)

    def frames(self, images: Tensor) -> Tensor | None:
        """See `difflens_core.classifiers.frames_of`."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        parts = [frames_of(self.classifier, batch) for batch in images.split(BATCH)]
        return None if parts[0] is None else torch.cat(parts)

    def log_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """See `DifferentiableClassifier.log_probabilities`."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        with differentiable(self.classifier):
            return self.classifier.log_probabilities(images)


PAIRS = (
    "Pairs that fit: a CLIP-L file with its text projection, such as clip_l.safetensors, in Load CLIP, and CLIP "
    "ViT-L/14 in Load CLIP Vision (768 numbers); the CLIP of Stable Diffusion 2 and CLIP-ViT-H-14 (1024); the CLIP of "
    "SDXL and CLIP-ViT-bigG-14 (1280)."
)


def text_embeddings(clip: CLIP, prompts: Sequence[str]) -> Tensor:
    """Embeddings of prompts (n x d, fp32, on the CPU) in the space that CLIP shares with pictures.

    That is the pooled output behind the text projection. `CLIP.encode_from_tokens` gives it before the projection for
    Stable Diffusion 1, so the option is set here. Raises `DiffLensError` if the CLIP has no such output.
    """
    if files := files_without_projection(clip):
        raise DiffLensError(
            f"the CLIP comes from {files}, which lacks CLIP's text projection, as checkpoints of Stable Diffusion 1 "
            f"do. Without it texts cannot be compared with pictures. {PAIRS}"
        )
    model, found = clip.cond_stage_model, []
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        model.reset_clip_options()
        clip.load_model(tokens)
        model.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
        pooled = model.encode_token_weights(tokens)[1]
        if pooled is None or pooled.ndim != 2:
            raise DiffLensError(f"this text encoder is no CLIP: it has no embedding to compare pictures with. {PAIRS}")
        found.append(pooled[0].float().cpu())
    model.reset_clip_options()
    return torch.stack(found)


def files_without_projection(clip: CLIP) -> str:
    """Names of the files that a CLIP was loaded from if they are known and none holds a text projection, else ""."""
    _, arguments, *_ = clip.patcher.cached_patcher_init or (None, ())  # how ComfyUI would load it once more
    first = arguments[0] if arguments else None  # a checkpoint, or a list of text encoders
    paths = [Path(path) for path in (first if isinstance(first, list) else [first]) if isinstance(path, str)]
    if not paths or not all(path.suffix in (".safetensors", ".sft") and path.is_file() for path in paths):
        return ""
    names = [name for path in paths for name in tensor_names(path)]
    found = any(name.endswith(("text_projection", "text_projection.weight")) for name in names)
    return "" if found else " and ".join(path.name for path in paths)


def tensor_names(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()


def image_embedder(clip_vision: ClipVisionModel, width: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function that gives embeddings (b x width) of pictures (b x H x W x 3 in [0, 1]), cut to squares.

    Raises `DiffLensError` if the model is no CLIP or its embeddings are not of that width (None: of any).
    """
    found = clip_vision.config.get("projection_dim")
    if found is None:
        kind = clip_vision.model_type
        raise DiffLensError(f"this CLIP vision model ({kind}) shares no space with CLIP's texts. {PAIRS}")
    if width not in (None, found):
        raise DiffLensError(
            f"the CLIP's embeddings have {width} numbers, the CLIP vision model's {found}. Both must be halves of one "
            f"CLIP. {PAIRS}"
        )

    def embed(images: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return clip_vision.encode_image(images)["image_embeds"]

    return embed
