"""Recipes in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import DiffLensError, in_bytes, load_tensors, out_of_bytes, reading, refuse_whole_numbers, save_tensors
from ..locate import CHANGES, FRAME, LEVELS, Changes, FrameProbes, Levels
from ..sae import NORMALISATION, Normalisation, check_steps
from .recipes import Recipe, check_together

TENSORS = ("features", "encoder", "bias", "threshold", "decoder", "member", "probe_weight", "probe_bias")
# Kept in a byte a number.
LARGE = (
    "encoder", "decoder", "probe_weight", "levels.maps", "levels.places", "levels.effects", "levels.weight",
    "frame.weight", "changes.readout", "changes.first", "changes.second", "changes.last", "changes.maps",
)  # fmt: skip
# Features, width, classes, steps of the capture and of the normalisation, patterns over positions, positions, channels,
# traits, maps, edges; of the changes patterns (Q), the network (J, I, O), courses (M) and maps (U).
AXES = {
    "features": "F", "weight": "F", "encoder": "FW", "decoder": "FW", "bias": "F", "threshold": "F", "member": "KF",
    "levels.maps": "RFD", "levels.places": "DP", "levels.classes": "SKR", "levels.effects": "SKGR",
    "levels.weight": "SGW", "levels.bias": "SG", "frame.weight": "SEW", "frame.bias": "SE", "probe_weight": "SKW",
    "probe_bias": "SK", "changes.readout": "QW", "changes.offset": "Q",
    "changes.first": "JIIQ", "changes.first_bias": "J", "changes.second": "JIIJ", "changes.second_bias": "J",
    "changes.last": "KOJ", "changes.last_bias": "KO", "changes.amounts": "SM", "changes.sizes": "U",
    "changes.maps": "UF",
    "normalisation.progress": "N", "normalisation.mean": "NC", "normalisation.scale": "N",
    "normalisation.modulation": "NTC",
}  # fmt: skip
OPTIONAL = (
    "weight", "frame.weight", "frame.bias", "levels.effects", "levels.weight", "levels.bias",
    "normalisation.modulation", *(f"changes.{name}" for name in CHANGES),
)  # fmt: skip
MOST_LEVELS = 4096  # steps times classes, and positions, in files of version 0.4 and before
PLAIN = ("attribute", "classes", "site", "model", "mode", "strength", "start", "end", "map", "hold", "info")


def held(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors of levels that go by such attributes."""
    return LEVELS if attributes else LEVELS[:3]


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write a recipe (its large tensors in a byte a number, some 700 KB)."""
    save_tensors(path, "recipe", *stored(recipe))


def as_stored(recipe: Recipe) -> Recipe:
    """The recipe as a file of it would be read: so pictures are the same before it is saved and after."""
    return restored(*stored(recipe))


def stored(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a recipe's file holds: tensors, and what is none. Those of further sites have numbers before their names."""
    (tensors, plain), *further = map(stored_part, (recipe, *recipe.further))
    for number, (own, _) in enumerate(further, 1):
        tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
    return tensors, plain | {"further": [own for _, own in further]}


def stored_part(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of one site. A recipe without levels is small, and kept to the bit."""
    tensors = {name: getattr(recipe, name) for name in TENSORS}
    tensors |= {f"levels.{name}": getattr(recipe.levels, name) for name in held(recipe.levels.attributes)}
    if recipe.frame:
        tensors |= {f"frame.{name}": getattr(recipe.frame, name) for name in FRAME}
    if recipe.changes:
        tensors |= {f"changes.{name}": getattr(recipe.changes, name) for name in CHANGES}
    tensors |= {f"normalisation.{name}": getattr(recipe.normalisation, name) for name in NORMALISATION}
    if recipe.weight is not None:
        tensors["weight"] = recipe.weight
    if recipe.normalisation.modulation is not None:
        tensors["normalisation.modulation"] = recipe.normalisation.modulation
    plain = {name: getattr(recipe, name) for name in PLAIN}
    plain["traits"] = {name: list(classes) for name, classes in recipe.levels.attributes.items()}
    return in_bytes(tensors, LARGE) if recipe.levels.positions else tensors, plain


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe that `save_recipe` wrote. Raises `DiffLensError` if it does not fit."""
    needs = [*TENSORS, *(f"normalisation.{name}" for name in NORMALISATION), *PLAIN]
    needs = [name for name in needs if name not in ("map", "hold")]  # files of version 0.4 and before do not tell
    tensors, info = load_tensors(path, "recipe", needs)
    with reading(path):
        return restored(tensors, info)


def restored(tensors: dict[str, Tensor], info: dict[str, Any]) -> Recipe:
    """The recipe that a file holds. Raises `DiffLensError` if its parts do not fit."""
    first, *further = (
        restored_part({name.removeprefix(prefix): t for name, t in tensors.items() if prefix_of(name) == prefix}, own)
        for prefix, own in (("", info), *((f"{number}/", own) for number, own in enumerate(info.get("further", []), 1)))
    )
    check_together([first, *further])
    return replace(first, further=tuple(further))


def prefix_of(name: str) -> str:
    """What `stored` put before a tensor's name."""
    return name[: name.find("/") + 1]


def restored_part(tensors: dict[str, Tensor], info: dict[str, Any]) -> Recipe:
    """The recipe of one site."""
    info |= {"map": tuple(info.get("map") or ()) or None, "hold": bool(info.get("hold"))}
    if missing := [name for name in PLAIN if name not in info]:
        raise DiffLensError(f"it does not tell {missing[0]} of one of its sites. The file is damaged.")
    tensors = out_of_bytes(tensors)
    refuse_whole_numbers(tensors, ("features", "member"))
    with_level_maps(tensors, info)
    check_shapes(tensors)
    check_told(tensors, info)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    parts = {name: info[name] for name in PLAIN} | {name: tensors[name] for name in TENSORS}
    parts |= {"classes": tuple(map(str, parts["classes"])), "strength": tuple(map(float, parts["strength"]))}
    parts |= {"start": float(parts["start"]), "end": float(parts["end"]), "info": dict(parts["info"])}
    if not all(map(isfinite, (*parts["strength"], parts["start"], parts["end"]))):
        raise DiffLensError("a strength, or its start or end, is no number. The file is damaged.")
    attributes = {name: tuple(classes) for name, classes in info["traits"].items()}
    own = [tensors[f"levels.{name}"] for name in held(attributes)]
    levels = Levels(*own, attributes) if attributes else Levels.plain(*own)  # type: ignore[call-arg, arg-type]
    frame = FrameProbes(tensors["frame.weight"], tensors["frame.bias"]) if "frame.weight" in tensors else None
    changes = Changes(*(tensors[f"changes.{name}"] for name in CHANGES)) if "changes.maps" in tensors else None
    progress, mean, scale = (tensors[f"normalisation.{name}"] for name in NORMALISATION)
    normalisation = Normalisation(progress, mean, scale, tensors.get("normalisation.modulation"))
    return Recipe(
        **parts, levels=levels, normalisation=normalisation, frame=frame, changes=changes, weight=tensors.get("weight")
    )  # fmt: skip


def check_told(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Raise `DiffLensError` if what a recipe says of its tensors is not so."""
    names = [name for of in info["traits"].values() for name in of]
    texts = [*(info[name] for name in ("attribute", "site", "model", "mode")), *info["classes"], *names]
    if not all(isinstance(text, str) for text in texts):
        raise DiffLensError(
            "its attribute, site, model, mode, classes or traits are not all texts. The file is damaged."
        )
    if not all(type(n) is int and n > 0 for n in info["map"] or ()) or len(info["map"] or "hw") != 2:
        raise DiffLensError(f"its map is {info['map']!r}, expected height and width. The file is damaged.")
    positions = tensors["levels.places"].shape[1]
    traits = tensors["levels.bias"].shape[1] if info["traits"] else 0
    said = {
        "classes": (len(info["classes"]), len(tensors["member"])),
        "traits": (len(names), traits),
        "positions": (prod(info["map"] or (positions,)) if positions else 0, positions),
    }
    for what, (told, found) in said.items():
        if told != found:
            raise DiffLensError(f"it tells of {told} {what} and holds {found}. The file is damaged.")
    features, steps = tensors["features"], tensors["probe_bias"]
    if features.is_floating_point() or not features.numel() or not steps.numel():
        raise DiffLensError("it has no features, or no steps. The file is damaged.")
    check_steps(tensors["normalisation.progress"], tensors["normalisation.scale"])
    check_shown(info["info"], features.numel())


def check_shown(info: Mapping[str, Any], features: int) -> None:
    """Raise `DiffLensError` if scores and names, which the explorer shows, are none."""
    scores, named = info.get("scores", [0.0] * features), info.get("named", {})
    if len(scores) != features or not all(isinstance(score, (int, float)) for score in scores):
        raise DiffLensError(f"its scores are no numbers of {features} features. The file is damaged.")
    for words in named.values():
        if not words.keys() <= {"name", "group"} or not all(isinstance(word, str) for word in words.values()):
            raise DiffLensError("its names of features are not all a name and a group. The file is damaged.")


def with_level_maps(tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Bring levels of files of version 0.4, one for each step, class and position, into the shape of today's."""
    if "levels.maps" in tensors:
        return
    dense = tensors.pop("levels", torch.zeros(0))
    if dense.ndim != 4:
        raise DiffLensError("it holds no levels. The file is damaged.")
    steps, classes, _, positions = dense.shape
    if max(steps * classes, positions) > MOST_LEVELS:
        raise DiffLensError(f"it holds levels of shape {tuple(dense.shape)}, too large for a file of that age.")
    levels, info["traits"] = Levels.of(dense), {}
    tensors |= {f"levels.{name}": getattr(levels, name) for name in held({})}


def same_rows(rows: Tensor, stored: Tensor) -> bool:
    """Whether rows (F x width) are those of a recipe's file, which rounds them (see `in_bytes`)."""
    rounding = rows.abs().amax(dim=1, keepdim=True) / 200
    return rows.shape == stored.shape and bool(((rows - stored).abs() <= rounding).all())


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` if the parts of a recipe do not belong together."""
    sizes = {"T": 2}  # gain and offset
    for name, axes in AXES.items():
        if name in OPTIONAL and name not in tensors:
            continue
        if name not in tensors:
            raise DiffLensError(f"it lacks {name}. The file is damaged.")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            expected = " x ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise DiffLensError(f"{name} has shape {shape}, expected {expected}. The file is damaged.")
