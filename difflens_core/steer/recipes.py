"""A recipe: the few latents that carry an attribute, and all that is needed to steer by them without the SAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import DiffLensError, in_bytes, load_tensors, out_of_bytes, refuse_whole_numbers, save_tensors
from ..locate import FRAME, LEVELS, FrameProbes, Levels
from ..sae import NORMALISATION, Normalisation

MODES = ("reach", "shift", "add", "add own", "add fixed", "add own fixed", "move", "clamp", "scale", "ablate")
# Modes that read how active the latents are.
READING = ("reach", "move", "clamp", "scale", "ablate")
WITHOUT_LEVELS = ("add fixed", "add own fixed", "scale", "ablate")
# Threshold of a latent of which only the SAE can tell where it is active.
UNKNOWN = -1.0


@dataclass(frozen=True)
class Recipe:
    """F latents of an SAE with what steering by them needs.

    encoder, decoder: F x width, which is C, or C H W for an SAE of the whole map (`kernel`); bias, threshold: F (a
    latent is active where its pre-activation exceeds the threshold, fitted to agree with TopK, or UNKNOWN); member:
    K x F, which latents belong to which class; levels: mean activity per step, class, position and what else a picture
    shows (no positions: not known); probe_weight: S x K x width and probe_bias: S x K read the class that a picture is
    about to show. mode, strength, start, end: how to edit, see `Steering`; hold: whether to hold on to the unsteered
    pictures, which takes twice the time. weight: F, how much of its change each latent makes, all of it if None. model:
    fingerprint of the weights it was made on. map: height and width of the map whose positions they are, None if not
    known. frame: reads where the subject is; then the map is that of its frame, wherever in the picture, see
    `activations.into_frames`. info: provenance and figures.
    """

    attribute: str
    classes: tuple[str, ...]
    site: str
    model: str
    features: Tensor
    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    member: Tensor
    levels: Levels
    probe_weight: Tensor
    probe_bias: Tensor
    normalisation: Normalisation
    mode: str = "shift"
    strength: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0
    weight: Tensor | None = None
    map: tuple[int, int] | None = None
    frame: FrameProbes | None = None
    hold: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DiffLensError(f"recipe for {self.attribute}: mode {self.mode!r} is unknown, expected one of {MODES}.")
        if len(self.strength) != len(self.classes):
            raise DiffLensError(
                f"recipe for {self.attribute}: {len(self.strength)} strengths for {len(self.classes)} classes."
            )
        if not self.levels.positions and self.mode not in WITHOUT_LEVELS:
            raise DiffLensError(
                f"recipe for {self.attribute}: mode {self.mode!r} needs class levels, and this recipe has none. Use "
                f"one of {', '.join(WITHOUT_LEVELS)}, or a recipe from Attribute Features."
            )

    @property
    def width(self) -> int:
        return self.decoder.shape[1]

    @property
    def writes(self) -> Tensor:
        """What a unit of each latent's change adds to a row: F x width."""
        return self.decoder if self.weight is None else self.weight[:, None] * self.decoder

    @property
    def needs_sae(self) -> bool:
        """Whether only the SAE can tell where the latents are active."""
        return bool((self.threshold == UNKNOWN).any())

    @property
    def channels(self) -> int:
        """C of the site's activations."""
        return self.normalisation.mean.shape[1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width of the map that the levels are of: `map`, or a square. None if it cannot be one."""
        side = isqrt(self.levels.positions)
        return self.map or ((side, side) if side**2 == self.levels.positions else None)

    def fits(self, height: int, width: int) -> bool:
        """Whether the levels are of such a map, or, if theirs is not known, of as many tokens in a row."""
        tokens = not self.map and 1 in (height, width) and height * width == self.levels.positions
        return (height, width) == self.grid or tokens

    def stretched(self, height: int, width: int) -> Recipe:
        """The recipe for maps of another size: its levels, resampled linearly, as a picture would be."""

        places = self.levels.places.unflatten(1, self.grid)[None]
        places = F.interpolate(places, (height, width), mode="bilinear", antialias=True)[0].flatten(1)
        return replace(self, levels=replace(self.levels, places=places), map=(height, width))

    @property
    def kernel(self) -> int:
        """1, or the side of the whole map, if the SAE read that at once: see `SparseAutoencoder`."""
        return isqrt(self.width // self.channels)

    @property
    def means(self) -> Tensor:
        """The normalisation's means as wide as a row: S x width."""
        return self.normalisation.mean.repeat_interleave(self.kernel**2, dim=1)

    def columns(self, h: Tensor) -> Tensor:
        """Activations B x C x H x W as columns B x width x P: P is H W, or 1 for a kernel of the whole map."""
        return h.flatten(2) if self.kernel == 1 else h.flatten(1)[:, :, None]


TENSORS = ("features", "encoder", "bias", "threshold", "decoder", "member", "probe_weight", "probe_bias")
# Kept in a byte a number.
LARGE = (
    "encoder", "decoder", "probe_weight", "levels.maps", "levels.places", "levels.effects", "levels.weight",
    "frame.weight",
)  # fmt: skip
# Features, width, classes, steps of the capture and of the normalisation, patterns over positions, positions, channels,
# traits, maps, edges.
AXES = {
    "features": "F", "weight": "F", "encoder": "FW", "decoder": "FW", "bias": "F", "threshold": "F", "member": "KF",
    "levels.maps": "RFD", "levels.places": "DP", "levels.classes": "SKR", "levels.effects": "SKGR",
    "levels.weight": "SGW", "levels.bias": "SG", "frame.weight": "SEW", "frame.bias": "SE", "probe_weight": "SKW",
    "probe_bias": "SK",
    "normalisation.progress": "N", "normalisation.mean": "NC", "normalisation.scale": "N",
}  # fmt: skip
OPTIONAL = ("weight", "frame.weight", "frame.bias", "levels.effects", "levels.weight", "levels.bias")
PLAIN = ("attribute", "classes", "site", "model", "mode", "strength", "start", "end", "map", "hold", "info")


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with another mode, strength, start, end or hold. A single strength serves every class."""
    if isinstance(settings.get("strength"), (int, float)):
        settings["strength"] = (float(settings["strength"]),) * len(recipe.classes)
    return replace(recipe, **settings)


def at_dose(recipe: Recipe, dose: float) -> Recipe:
    """The recipe at `dose` times its own strength."""
    return with_settings(recipe, strength=tuple(dose * own for own in recipe.strength))


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
    """What a recipe's file holds: tensors, and what is none. One without levels is small, and kept to the bit."""
    tensors = {name: getattr(recipe, name) for name in TENSORS}
    tensors |= {f"levels.{name}": getattr(recipe.levels, name) for name in held(recipe.levels.attributes)}
    if recipe.frame:
        tensors |= {f"frame.{name}": getattr(recipe.frame, name) for name in FRAME}
    tensors |= {f"normalisation.{name}": getattr(recipe.normalisation, name) for name in NORMALISATION}
    if recipe.weight is not None:
        tensors["weight"] = recipe.weight
    plain = {name: getattr(recipe, name) for name in PLAIN}
    plain["traits"] = {name: list(classes) for name, classes in recipe.levels.attributes.items()}
    return in_bytes(tensors, LARGE) if recipe.levels.positions else tensors, plain


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe that `save_recipe` wrote. Raises `DiffLensError` if it does not fit."""
    needs = [*TENSORS, *(f"normalisation.{name}" for name in NORMALISATION), *PLAIN]
    needs = [name for name in needs if name not in ("map", "hold")]  # files of version 0.4 and before do not tell
    tensors, info = load_tensors(path, "recipe", needs)
    try:
        return restored(tensors, info)
    except DiffLensError as error:
        raise DiffLensError(f"{Path(path).name}: {error}") from error


def restored(tensors: dict[str, Tensor], info: dict[str, Any]) -> Recipe:
    """The recipe that a file holds. Raises `DiffLensError` if its parts do not fit."""
    info |= {"map": tuple(info.get("map") or ()) or None, "hold": bool(info.get("hold"))}
    tensors = out_of_bytes(tensors)
    refuse_whole_numbers(tensors, ("features", "member"))
    with_level_maps(tensors, info)
    check_shapes(tensors)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    parts = {name: info[name] for name in PLAIN} | {name: tensors[name] for name in TENSORS}
    parts["classes"], parts["strength"] = tuple(parts["classes"]), tuple(parts["strength"])
    attributes = {name: tuple(classes) for name, classes in info["traits"].items()}
    own = [tensors[f"levels.{name}"] for name in held(attributes)]
    levels = Levels(*own, attributes) if attributes else Levels.plain(*own)  # type: ignore[call-arg, arg-type]
    frame = FrameProbes(tensors["frame.weight"], tensors["frame.bias"]) if "frame.weight" in tensors else None
    normalisation = Normalisation(*(tensors[f"normalisation.{name}"] for name in NORMALISATION))
    return Recipe(
        **parts, levels=levels, normalisation=normalisation, frame=frame, weight=tensors.get("weight")
    )  # fmt: skip


def with_level_maps(tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Bring levels of files of version 0.4, one for each step, class and position, into the shape of today's."""
    if "levels.maps" in tensors:
        return
    dense = tensors.pop("levels", torch.zeros(0))
    if dense.ndim != 4:
        raise DiffLensError("it holds no levels. The file is damaged.")
    levels, info["traits"] = Levels.of(dense), {}
    tensors |= {f"levels.{name}": getattr(levels, name) for name in held({})}


def same_rows(rows: Tensor, stored: Tensor) -> bool:
    """Whether rows (F x width) are those of a recipe's file, which rounds them (see `in_bytes`)."""
    rounding = rows.abs().amax(dim=1, keepdim=True) / 200
    return rows.shape == stored.shape and bool(((rows - stored).abs() <= rounding).all())


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `DiffLensError` if the parts of a recipe do not belong together."""
    sizes: dict[str, int] = {}
    for name, axes in AXES.items():
        if name in OPTIONAL and name not in tensors:
            continue
        if name not in tensors:
            raise DiffLensError(f"it lacks {name}. The file is damaged.")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes) or any(sizes.setdefault(axis, n) != n for axis, n in zip(axes, shape, strict=True)):
            expected = " x ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise DiffLensError(f"{name} has shape {shape}, expected {expected}. The file is damaged.")
