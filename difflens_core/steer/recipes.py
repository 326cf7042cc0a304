"""A recipe: the few latents that carry an attribute, and all that is needed to steer by them without the SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..files import DiffLensError
from ..locate import Changes, FrameProbes, Levels
from ..sae import Normalisation

MODES = ("reach", "shift", "add", "add own", "add fixed", "add own fixed", "move", "clamp", "scale", "ablate")
# The mode that goes by the finished picture instead of by what is there at the step.
TWIN = "twin"
# Modes that read how active the latents are.
READING = ("reach", "move", "clamp", "scale", "ablate")
WITHOUT_LEVELS = ("add fixed", "add own fixed", "scale", "ablate")
# Threshold of a latent of which only the SAE can tell where it is active.
UNKNOWN = -1.0
# Threshold of a latent that is active everywhere.
ALWAYS = -1e9
SETTINGS = ("mode", "strength", "start", "end", "hold")


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
    `activations.into_frames`. changes: what the latents do more in the same picture of another class, for mode twin,
    see `Changes`. further: recipes of other sites that are steered together with this one, by its settings,
    see `joined`. info: provenance and figures; "scores": a number for each latent by which they were ranked; "named":
    names and groups that a person gave to latents, by their numbers.
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
    changes: Changes | None = None
    hold: bool = False
    further: tuple[Recipe, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, TWIN):
            known = ", ".join((*MODES, TWIN))
            raise DiffLensError(f"recipe for {self.attribute}: mode {self.mode!r} is unknown, expected one of {known}.")
        if len(self.strength) != len(self.classes):
            raise DiffLensError(
                f"recipe for {self.attribute}: {len(self.strength)} strengths for {len(self.classes)} classes."
            )
        if self.mode not in (*WITHOUT_LEVELS, TWIN) and not all(
            part.levels.positions for part in (self, *self.further)
        ):
            raise DiffLensError(
                f"recipe for {self.attribute}: mode {self.mode!r} needs class levels, and this recipe has none. Use "
                f"one of {', '.join(WITHOUT_LEVELS)}, or a recipe from Attribute Features."
            )
        of_twins = any(part.changes for part in (self, *self.further))
        if self.further and (of_twins or self.mode == TWIN):
            raise DiffLensError(
                f"recipe for {self.attribute}: what was learned from twins, pictures of the same noise, is of one site "
                "and cannot be joined to others. Use one of them alone."
            )
        if self.mode == TWIN and not self.changes:
            raise DiffLensError(
                f"recipe for {self.attribute}: mode twin is for recipes from pictures that were captured as twins, of "
                "the same noise. Use mode shift, or capture twins and attribute again."
            )
        if self.changes and self.mode not in (*WITHOUT_LEVELS, TWIN):
            raise DiffLensError(
                f"recipe for {self.attribute}: it was learned from twins and knows no levels of single positions, by "
                f"which mode {self.mode!r} goes. Leave the mode that the recipe brings, or use one of "
                f"{', '.join(WITHOUT_LEVELS)}."
            )
        if self.mode == TWIN and not self.hold:
            raise DiffLensError(
                f"recipe for {self.attribute}: mode twin looks at the finished picture before it changes it, so hold "
                "must be on."
            )

    @property
    def parts(self) -> tuple[Recipe, ...]:
        """A recipe for each of the sites, all by the same settings."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return replace(self, further=()), *(replace(part, **settings) for part in self.further)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.site, *(part.site for part in self.further)

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
        return any(bool((part.threshold == UNKNOWN).any()) for part in (self, *self.further))

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


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with another mode, strength, start, end or hold. A single strength serves every class."""
    if isinstance(settings.get("strength"), (int, float)):
        settings["strength"] = (float(settings["strength"]),) * len(recipe.classes)
    return replace(recipe, **settings)


def at_dose(recipe: Recipe, dose: float) -> Recipe:
    """The recipe at `dose` times its own strength."""
    return with_settings(recipe, strength=tuple(dose * own for own in recipe.strength))


# What was found for all latents of a recipe together, and says nothing of some of them.
FOR_ALL = ("calibration", "weighed")


def of_latents(recipe: Recipe, kept: Tensor) -> Recipe:
    """The recipe with some of its latents alone (kept: F booleans)."""
    rows = {name: getattr(recipe, name)[kept] for name in ("features", "encoder", "bias", "threshold", "decoder")}
    info = {name: value for name, value in recipe.info.items() if name not in FOR_ALL}
    if "scores" in info:
        info["scores"] = [score for score, own in zip(info["scores"], kept.tolist(), strict=True) if own]
    weight = None if recipe.weight is None else recipe.weight[kept]
    levels, changes = recipe.levels.some(kept), recipe.changes and recipe.changes.some(kept)
    return replace(
        recipe, **rows, member=recipe.member[:, kept], levels=levels, changes=changes, weight=weight, info=info
    )


def joined(*recipes: Recipe) -> Recipe:
    """One recipe of all their sites, which are then steered together: by the first one's mode and strength.

    It acts where all of them do. It does not hold: what a later site put out in unsteered pictures lacks what the
    earlier sites change. Raises `DiffLensError` if they do not belong together.
    """
    parts = [part for recipe in recipes for part in recipe.parts]
    check_together(parts)
    start, end = max(part.start for part in parts), min(part.end for part in parts)
    return replace(parts[0], further=tuple(parts[1:]), start=start, end=end, hold=False)


def check_together(parts: Sequence[Recipe]) -> None:
    """Raise `DiffLensError` if recipes of one site each cannot be one of several."""
    first, sites = parts[0], [part.site for part in parts]
    for part in parts[1:]:
        if (part.attribute, part.classes) != (first.attribute, first.classes):
            one, other = (f"{of.attribute} ({', '.join(of.classes)})" for of in (first, part))
            raise DiffLensError(f"recipes for {one} and {other} cannot be joined. Join those of one attribute.")
        if part.model != first.model:
            raise DiffLensError(
                f"the recipes for {first.attribute} at {first.site} and {part.site} were made on different weights. "
                "Join recipes of one model."
            )
    if twice := [site for site in dict.fromkeys(sites) if sites.count(site) > 1]:
        raise DiffLensError(f"two recipes for {first.attribute} are of {twice[0]}. Join recipes of different sites.")


def check_one_site(recipe: Recipe, what: str) -> None:
    """Raise `DiffLensError` if the recipe is of several sites, for `what` looks at the latents of one."""
    if recipe.further:
        raise DiffLensError(
            f"the recipe for {recipe.attribute} is of several sites ({', '.join(recipe.sites)}), and {what} looks at "
            "the latents of one. Give it the recipe of one site, before they were joined."
        )
