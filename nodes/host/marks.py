"""Marks that tell a model's weights and patches, a recipe or an input from others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ...difflens_core.activations import Activations
from ...difflens_core.files import digest, fingerprint, same_weights, sums_mark
from ...difflens_core.networks import Denoiser
from ...difflens_core.sae import TrainingOptions
from ...difflens_core.steer import Recipe
from ...difflens_core.targets import Targets
from .files import RECIPES, info_of, list_files
from .progress import log

FINGERPRINT = "difflens_fingerprint"  # attachment of a MODEL: `marks_of` its file

# Parts of a quantised weight that the same weight in another precision lacks.
SCALES = {"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "scale_weight", "scale_input"}
SCALES |= {"comfy_quant", "scaled_fp8"}

Weights = Mapping[str, Tensor]


def marks_of(weights: Weights) -> tuple[str, str]:
    """The mark of weights, and the one that files of version 0.4 and before have."""
    return fingerprint(weights), sums_mark(weights)


def model_fingerprint(model: ModelPatcher) -> str:
    """Tells the weights of a MODEL from others', whatever their precision: of a denoiser all, of larger models the
    first eight by name. "" if they cannot be read (engines, packed weights of other packs).

    Those of its file, without LoRAs: they are in the network only while it is loaded, and would change the mark. Our
    loader leaves the marks of models that it may load in fp16, taken before they were rounded.
    """
    if marks := model.get_attachment(FINGERPRINT):
        return marks[0]
    return mark_by(fingerprint, readable_weights, model)


def belongs(mark: str, model: ModelPatcher) -> bool:
    """Whether the mark in a recipe or a capture may be that of the model: also if one of them has none."""
    if not mark:
        return True
    if marks := model.get_attachment(FINGERPRINT):
        return any(same_weights(mark, own) for own in marks)
    own = model_fingerprint(model)
    return not own or same_weights(mark, own) or mark == mark_by(sums_mark, stored_weights, model)


def mark_by(mark: Callable[[Weights], str], read: Callable[[ModelPatcher], Weights], model: ModelPatcher) -> str:
    try:
        weights = read(model)
        return mark({name: weights[name] for name in chosen(weights, model)})
    except Exception as error:  # networks of other packs answer anything; a mark is worth no error
        log.debug("the weights of this model cannot be read (%r), so it has no mark", error)
        return ""


def chosen(weights: Weights, model: ModelPatcher) -> list[str]:
    names = sorted(weights)
    return names if isinstance(model.model.diffusion_model, Denoiser) else names[:8]


def readable_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """The network's weights by name, as numbers. Raises an error if one of those `chosen` holds none."""
    network, found = model.model.diffusion_model, {}
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in network.named_parameters()} | kept(model)
    weights = {name: weight for name, weight in weights.items() if name.rpartition(".")[2] not in SCALES}
    for name in chosen(weights, model):
        weight = weights[name].detach()
        found[name] = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        if not found[name].is_floating_point() or found[name].is_meta:
            raise TypeError(f"{name} is {weight.dtype} on {weight.device}")
    return found


def stored_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """What version 0.4 read."""
    return model.model.diffusion_model.state_dict() | kept(model)


def kept(model: ModelPatcher) -> dict[str, Tensor]:
    """The weights that a loaded LoRA changed, as they were."""
    prefix = "diffusion_model."
    return {key[len(prefix) :]: own.weight for key, own in model.backup.items() if key.startswith(prefix)}


def patches_mark(model: ModelPatcher) -> str:
    """Tells the patches on a MODEL from others', "" if it has none. Stable from one start of the server to the next.

    ComfyUI's own mark, patches_uuid, is drawn anew for every patch. Patches of weights, such as LoRAs, count with
    their strengths and tensors. What acts while sampling counts by its place and kind, and by its settings as far as
    they can be read: see `described`.
    """
    acting = model.object_patches, model.wrappers, model.model_options
    found = f"({described(model.patches, summed)}, {', '.join(map(described, acting))})"
    return "" if found == "({}, {}, {}, {})" else digest(found)


def content_mark(*values: Any) -> str:
    """Tells values such as recipes, targets, SAEs and masks from others."""
    return digest(described(values))


def summed(tensor: Tensor) -> str:
    """Tells weights apart, which may be as large as a model."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_meta else f" {float(tensor.cpu().double().sum()):.6e}")


def exact(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_meta else f" {digest(*content([tensor]))}")


def described(value: Any, tensor: Callable[[Tensor], str] = exact, depth: int = 8) -> str:
    """Text that is the same for equal values and patches, whichever objects hold them.

    An object with a string `difflens_mark` is described by that. Functions are by their names and what they were made
    with, modules by their buffers, other objects by their class alone: what they hold may change while sampling.
    """

    def inner(part: Any) -> str:
        return described(part, tensor, depth - 1)

    if isinstance(mark := getattr(value, "difflens_mark", None), str):
        return mark
    if isinstance(value, Tensor):
        return tensor(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if depth < 0:  # it may hold itself
        return name
    if isinstance(value, WeightAdapterBase):
        return f"{value.name} {inner(value.weights)}"
    if isinstance(value, dict):
        parts = [(key if isinstance(key, str) else inner(key), inner(part)) for key, part in value.items()]
        return "{" + ", ".join(sorted(f"{key}: {text}" for key, text in parts if text != "{}")) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(inner, value))})"
    parts = parts_of(value)
    return f"{name} {inner(parts)}" if parts else name


def parts_of(value: Any) -> Any:
    """What tells an object from others of its kind, as far as that is settled when it is made."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return (value.__self__,) if is_dataclass(value.__self__) or hasattr(value.__self__, "difflens_mark") else ()
    if isinstance(value, FunctionType):
        return [*cells(value), *(value.__defaults__ or ())]
    if isinstance(value, nn.Module):
        return dict(value.named_buffers())
    if isinstance(value, ControlBase):
        return value.strength, value.timestep_percent_range, value.cond_hint_original, value.previous_controlnet
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return ()


def cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # of a name that has no value yet
            yield cell.cell_contents


def content(parts: Sequence[Tensor | str]) -> Iterator[bytes | str]:
    """What tells one set of tensors from another, for `digest`."""
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        yield f"{tuple(part.shape)}"
        yield part.detach().cpu().float().contiguous().numpy().tobytes()


def conditioning_content(conditioning: list) -> list[Tensor | str]:
    """What a CONDITIONING says, in order: its tensors, and settings such as guidance, area, class and ControlNet."""
    parts: list[Tensor | str] = []
    for main, more in conditioning:
        values = (main, *more.values())
        parts += [value for value in values if isinstance(value, Tensor)]
        settings = {key: value for key, value in more.items() if value is not None and not isinstance(value, Tensor)}
        if (text := described(settings)) != "{}":
            parts.append(text)
    return parts


def recipes_of(model: ModelPatcher) -> list[str]:
    """The listed recipes that were made on the model."""
    marks = {name: info_of(RECIPES, name).get("model") for name in list_files(RECIPES)}
    return [name for name, mark in marks.items() if mark and belongs(mark, model)]


def recipe_mark(recipe: Recipe) -> str:
    """Tells one recipe from another, whatever their histories."""
    return content_mark(replace(recipe, info={}))


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
