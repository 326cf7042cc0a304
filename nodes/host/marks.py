"""Marks that tell a model's weights and patches, a recipe or an input from others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...difflens_core.activations import Activations
from ...difflens_core.files import digest, fingerprint
from ...difflens_core.networks import Denoiser
from ...difflens_core.sae import TrainingOptions
from ...difflens_core.steer import Recipe
from ...difflens_core.targets import Targets

FINGERPRINT = "difflens_fingerprint"  # attachment of a MODEL


def model_fingerprint(model: ModelPatcher) -> str:
    """Tells the weights of a MODEL from others': all of a denoiser's, the first eight by name of larger models.

    Those of its file, without LoRAs: they are in the network only while it is loaded, and would change the mark. Our
    loader leaves the mark of models that it may load in fp16, taken before they were rounded.
    """
    if mark := model.get_attachment(FINGERPRINT):
        return mark
    module = model.model.diffusion_model
    prefix, weights = "diffusion_model.", module.state_dict()
    weights |= {key[len(prefix) :]: kept.weight for key, kept in model.backup.items() if key.startswith(prefix)}
    chosen = sorted(weights) if isinstance(module, Denoiser) else sorted(weights)[:8]
    return fingerprint({name: weights[name] for name in chosen})


def patches_mark(model: ModelPatcher) -> str:
    """Tells the patches on a MODEL from others', "" if it has none. Stable from one start of the server to the next.

    ComfyUI's own mark, patches_uuid, is drawn anew for every patch. Patches of weights, such as LoRAs, count with
    their strengths and tensors. What acts while sampling counts by its place and kind: its settings cannot be read.
    """
    found = described((model.patches, model.object_patches, model.wrappers, model.model_options))
    return "" if found == described(({}, {}, {}, {})) else digest(found)


def described(value: Any) -> str:
    """Text that is the same for equal patches, whichever objects hold them."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {float(value.double().sum()):.6e}"
    if isinstance(value, WeightAdapterBase):
        return f"{value.name} {described(value.weights)}"
    if isinstance(value, dict):
        parts = [f"{key}: {text}" for key, inner in value.items() if (text := described(inner)) != "{}"]
        return "{" + ", ".join(sorted(parts)) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(described, value))})"
    if hasattr(value, "difflens_mark"):  # ours: told by what it does, not by what it is
        return value.difflens_mark
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def content(tensors: Sequence[Tensor]) -> Iterator[bytes | str]:
    """What tells one set of tensors from another, for `digest`."""
    for tensor in tensors:
        yield f"{tuple(tensor.shape)}"
        yield tensor.cpu().float().numpy().tobytes()


def conditioning_tensors(conditioning: list) -> list[Tensor]:
    """The tensors of a CONDITIONING, in order."""
    return [t for main, more in conditioning for t in (main, *more.values()) if isinstance(t, Tensor)]


def recipe_mark(recipe: Recipe) -> str:
    """Tells one recipe from another."""
    settings = f"{recipe.attribute}{recipe.site}{recipe.mode}{recipe.strength}{recipe.start}{recipe.end}"
    return digest(settings, recipe.decoder.numpy().tobytes(), recipe.levels.numpy().tobytes())


def training_mark(options: TrainingOptions, activations: Activations) -> str:
    """Tells one training run from another."""
    shape = (len(activations.progress), activations.pictures, activations.width, activations.positions)
    # Some rows tell captures apart; all of them may be more than one wants to read from the disk.
    some = activations.rows(activations.draw(2**14, options.seed, step=0))
    return digest(f"{options}{activations.site}{activations.model}{shape}", some.view(torch.uint8).numpy().tobytes())


DEAL = "difflens_deal"  # attachment of a MODEL


def dealt(model: ModelPatcher) -> Targets | None:
    """The deal of the last Steer that the MODEL went through, with those before it."""
    return model.get_attachment(DEAL)


def with_deal(model: ModelPatcher, targets: Targets) -> ModelPatcher:
    """The MODEL, a clone, with this deal as its last; of a plan the deals before it stay."""
    if targets.asked is None:
        model.set_attachments(DEAL, targets)
    return model
