"""A recipe: the few latents that carry an attribute, and all that is needed to steer by them without the SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activations
from .attribution import Attribution
from .files import DiffLensError, load_tensors, save_tensors
from .probes import Probes
from .sae import NORMALISATION, Normalisation, SparseAutoencoder

MODES = ("reach", "shift", "add", "add own", "add fixed", "add own fixed", "move", "clamp", "scale", "ablate")
# Modes that read how active the latents are.
READING = ("reach", "move", "clamp", "scale", "ablate")
WITHOUT_LEVELS = ("add fixed", "add own fixed", "scale", "ablate")
# Probes are surer of their class than right. Divided by this, a picture near the border is still pushed a little.
SOFTENING = 1.5
# Threshold of a latent of which only the SAE can tell where it is active.
UNKNOWN = -1.0


@dataclass(frozen=True)
class Recipe:
    """F latents of an SAE with what steering by them needs.

    encoder, decoder: F x width, which is C, or C H W for an SAE of the whole map (`kernel`); bias, threshold: F (a
    latent is active where its pre-activation exceeds the threshold, fitted to agree with TopK, or UNKNOWN); member:
    K x F, which latents belong to which class; levels: S x K x F x P, mean activity per step, class and position (no
    positions: not known); probe_weight: S x K x width and probe_bias: S x K read the class that a picture is about to
    show. mode, strength, start, end: how to edit, see `Steering`. model: fingerprint of the weights it was made on.
    info: provenance and figures.
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
    levels: Tensor
    probe_weight: Tensor
    probe_bias: Tensor
    normalisation: Normalisation
    mode: str = "shift"
    strength: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DiffLensError(f"recipe for {self.attribute}: mode {self.mode!r} is unknown, expected one of {MODES}.")
        if len(self.strength) != len(self.classes):
            raise DiffLensError(
                f"recipe for {self.attribute}: {len(self.strength)} strengths for {len(self.classes)} classes."
            )
        if self.levels.shape[-1] == 0 and self.mode not in WITHOUT_LEVELS:
            raise DiffLensError(
                f"recipe for {self.attribute}: mode {self.mode!r} needs class levels, and this recipe has none. Use "
                f"one of {', '.join(WITHOUT_LEVELS)}, or a recipe from Attribute Features."
            )

    @property
    def width(self) -> int:
        return self.decoder.shape[1]

    @property
    def needs_sae(self) -> bool:
        """Whether only the SAE can tell where the latents are active."""
        return bool((self.threshold == UNKNOWN).any())

    @property
    def channels(self) -> int:
        """C of the site's activations."""
        return self.normalisation.mean.shape[1]

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


TENSORS = (
    "features", "encoder", "bias", "threshold", "decoder", "member", "levels", "probe_weight", "probe_bias"
)  # fmt: skip
PLAIN = ("attribute", "classes", "site", "model", "mode", "strength", "start", "end", "info")


def build_recipe(
    attribution: Attribution,
    sae: SparseAutoencoder,
    probes: Probes,
    activations: Activations,
    count: int = 60,
    model: str = "",
) -> Recipe:
    """Recipe from the `count` best latents of every class.

    It has one row a step of `attribution`; SAE and probes may come from captures of other steps: the nearest serve.
    """
    top = attribution.top(count)
    chosen = top.unique()
    member = torch.stack([torch.isin(chosen, per_class) for per_class in top])
    encoder, bias = sae.encoder[chosen], sae.encoder_bias[chosen]
    threshold, agreement = fit_thresholds(activations, sae, chosen)
    classes = attribution.classes
    rows = [sae.normalisation.step_at(float(at)) for at in attribution.progress]
    probe_rows = [probes.step_at(float(at)) for at in attribution.progress]
    probe_weight, probe_bias = probes.weight[probe_rows] / SOFTENING, probes.bias[probe_rows] / SOFTENING
    normalisation = Normalisation(attribution.progress, sae.normalisation.mean[rows], sae.normalisation.scale[rows])
    return Recipe(
        attribution.attribute, classes, sae.site, model, chosen, encoder, bias, threshold, sae.decoder[chosen],
        member, attribution.levels[:, :, chosen], probe_weight, probe_bias, normalisation,
        strength=(1.0,) * len(classes),
        info={"gate_agreement": agreement, "ranking": attribution.method, "pictures": activations.pictures},
    )  # fmt: skip


def recipe_from_features(
    sae: SparseAutoencoder,
    attribute: str,
    features: Mapping[str, Sequence[int] | Tensor],
    mode: str = "scale",
    strength: float | tuple[float, ...] = 1.0,
) -> Recipe:
    """Recipe of latents chosen elsewhere, without probes or levels: `features` holds those of every class.

    strength: one for all classes or one each. Where TopK decides which latents are active, no threshold stands in for
    it: modes that read the latents then need the SAE as well.
    """
    wanted = {name: torch.as_tensor(numbers, dtype=torch.int64) for name, numbers in features.items()}
    chosen = torch.cat([*wanted.values()]).unique()
    if len(chosen) == 0 or not 0 <= int(chosen[0]) <= int(chosen[-1]) < sae.latents:
        raise DiffLensError(f"{attribute}: the features must be some of the SAE's latents 0 to {sae.latents - 1}.")
    member = torch.stack([torch.isin(chosen, own) for own in wanted.values()])
    steps, k, count = len(sae.normalisation.progress), len(wanted), len(chosen)
    threshold = torch.full((count,), UNKNOWN) if sae.activation == "topk" else sae.gate.expand(sae.latents)[chosen]
    recipe = Recipe(
        attribute, tuple(wanted), sae.site, "", chosen, sae.encoder[chosen], sae.encoder_bias[chosen], threshold,
        sae.decoder[chosen], member, torch.zeros(steps, k, count, 0), torch.zeros(steps, k, sae.width),
        torch.zeros(steps, k), sae.normalisation, mode, (1.0,) * k,
    )  # fmt: skip
    return with_settings(recipe, strength=strength)


@torch.no_grad()
def fit_thresholds(
    activations: Activations, sae: SparseAutoencoder, features: Tensor, pictures: int = 32
) -> tuple[Tensor, float]:
    """Threshold of each latent (F) whose gate agrees best with TopK on some pictures, and the mean agreement.

    For every latent the rows are sorted by pre-activation; a threshold after row i is right about the active rows
    above it and the inactive rows below, so one cumulative sum finds the best. Other SAEs have their own thresholds.
    """
    if sae.activation != "topk":
        return sae.gate.expand(sae.latents)[features], 1.0
    rows, active = [], []
    some = activations.part(0, pictures).values
    for values, progress in zip(some, activations.progress, strict=True):
        x = sae.rows(values, sae.normalisation.step_at(float(progress)))
        pre = F.linear(x, sae.encoder, sae.encoder_bias).flatten(0, 1)
        kth = pre.topk(sae.k, dim=1).values[:, -1:]
        rows.append(pre[:, features])
        active.append((pre[:, features] >= kth) & (pre[:, features] > 0))
    pre, order = torch.cat(rows).sort(dim=0)
    on = torch.cat(active).gather(0, order).float()
    zero = torch.zeros(1, on.shape[1])
    right = torch.cat([zero, (1 - on).cumsum(0)]) + torch.cat([on.flip(0).cumsum(0).flip(0), zero])
    best = right.argmax(dim=0)
    edges = torch.cat([pre[:1] - 1, (pre[:-1] + pre[1:]) / 2, pre[-1:] + 1])
    threshold = edges.gather(0, best[None])[0].clamp(min=0)
    return threshold, float(right.gather(0, best[None]).mean() / len(pre))


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with another mode, strength, start or end. A single strength serves every class."""
    if isinstance(settings.get("strength"), (int, float)):
        settings["strength"] = (float(settings["strength"]),) * len(recipe.classes)
    return replace(recipe, **settings)


def at_dose(recipe: Recipe, dose: float) -> Recipe:
    """The recipe at `dose` times its own strength."""
    return with_settings(recipe, strength=tuple(dose * own for own in recipe.strength))


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write a recipe (matrices as fp16, a few MB at most)."""
    tensors = {name: getattr(recipe, name) for name in TENSORS}
    for name in ("encoder", "decoder", "levels", "probe_weight"):
        tensors[name] = tensors[name].half()
    tensors |= {f"normalisation.{name}": getattr(recipe.normalisation, name) for name in NORMALISATION}
    save_tensors(path, "recipe", tensors, {name: getattr(recipe, name) for name in PLAIN})


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe that `save_recipe` wrote. Raises `DiffLensError` if it does not fit."""
    needs = [*TENSORS, *(f"normalisation.{name}" for name in NORMALISATION), *PLAIN]
    tensors, info = load_tensors(path, "recipe", needs)
    normalisation = Normalisation(*(tensors.pop(f"normalisation.{name}") for name in NORMALISATION))
    for name in ("encoder", "decoder", "probe_weight"):
        tensors[name] = tensors[name].float()
    plain = {name: info[name] for name in PLAIN}
    plain["classes"], plain["strength"] = tuple(plain["classes"]), tuple(plain["strength"])
    return Recipe(**plain, **{name: tensors[name] for name in TENSORS}, normalisation=normalisation)
