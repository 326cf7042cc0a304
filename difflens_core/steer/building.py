"""Recipes from what was located, or from latents chosen elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ..activations import Activations, FramedActivations
from ..files import DiffLensError
from ..locate import (
    Attribution,
    Labelled,
    LabelledPictures,
    Levels,
    Probes,
    RowsOf,
    fit_changes,
    fit_frames,
    fit_levels,
    latent_rows,
    tied,
)
from ..sae import SparseAutoencoder
from .recipes import TWIN, UNKNOWN, Recipe, with_settings

# Probes are surer of their class than right. Divided by this, a picture near the border is still pushed a little.
SOFTENING = 1.5
GATED = 2**16  # rows by which thresholds are fitted


def build_recipe(
    attribution: Attribution,
    sae: SparseAutoencoder,
    probes: Probes,
    activations: Activations,
    labels: Tensor,
    others: Labelled = MappingProxyType({}),
    count: int = 60,
    model: str = "",
    on_step: Callable[[int], None] = lambda step: None,
    readings: Mapping[str, Tensor] = MappingProxyType({}),
    more: Sequence[LabelledPictures] = (),
) -> Recipe:
    """Recipe from the `count` best latents of every class that speak for it (`Attribution.own`).

    It has one row a step of `attribution`; SAE and probes may come from captures of other steps: the nearest serve.
    It is on the CPU, and made where the SAE is. Of activations in their subjects' frames it follows the subject, see
    `Recipe.frame`. Of twins it learns what changes in a picture, wherever that is (mode twin); its levels are then
    means over all positions.
    labels, others: classes of the captured pictures, in the attribute and in others, by which `fit_levels` goes;
    readings: of twins, see `LabelledPictures`; more: twins of other sizes of picture, to learn from as well.
    """
    own = attribution.own(count)
    chosen = torch.cat(own).unique()
    if len(chosen) == 0:
        raise DiffLensError(
            f"{attribution.attribute}: no latent speaks for any class by {attribution.method}. Capture more pictures, "
            "or train the SAE longer."
        )
    member = torch.stack([torch.isin(chosen, per_class) for per_class in own])
    encoder, bias, decoder = (of[chosen.to(sae.device)].cpu() for of in (sae.encoder, sae.encoder_bias, sae.decoder))
    threshold, agreement = fit_thresholds(activations, sae, chosen)
    classes = attribution.classes
    probe_rows = [probes.step_at(float(at)) for at in attribution.progress]
    probe_weight, probe_bias = probes.weight[probe_rows] / SOFTENING, probes.bias[probe_rows] / SOFTENING
    whole = sae.normalisation.to("cpu")
    start, end = captured_part(attribution.progress)
    rows_of, twins = latent_rows(sae, chosen), activations.twins > 1 and sae.kernel == 1
    if more and not twins:
        raise DiffLensError(
            f"{attribution.attribute}: pictures of a second size serve only where twins of both are learned from, and "
            f"an SAE that reads {sae.kernel} x {sae.kernel} positions at once learns from none. Use an SAE of single "
            "positions and captures with twins, or leave the second size out."
        )
    levels = fit_levels(
        activations, whole, everywhere(rows_of) if twins else rows_of, labels, len(classes), others, on_step
    )
    levels = levels.without_traits() if twins else levels
    changes, steps = None, len(attribution.progress)
    if twins:  # told again at each batch that all steps are done, where a host may cancel
        captures = [LabelledPictures(activations, labels, others, readings), *more]
        changes = fit_changes(captures, whole, decoder, classes, lambda done: on_step(steps))
    frame = fit_frames(activations, whole) if isinstance(activations, FramedActivations) else None
    info = {
        "gate_agreement": agreement, "ranking": attribution.method, "pictures": activations.pictures,
        "scores": attribution.scores[:, chosen].masked_fill(~member, -torch.inf).amax(dim=0).tolist(),
        "tied": [name for name, (_, of) in others.items() if tied(labels, of)],
    }  # fmt: skip
    return Recipe(
        attribution.attribute, classes, sae.site, model, chosen, encoder, bias, threshold, decoder,
        member, levels, probe_weight, probe_bias, whole.at(attribution.progress),
        strength=(1.0,) * len(classes), start=start, end=end,
        map=activations.full_map if sae.kernel == 1 and not twins else None, frame=frame, changes=changes, hold=True,
        info=info, mode=TWIN if twins else "shift",
    )  # fmt: skip


def everywhere(rows_of: RowsOf) -> RowsOf:
    """The same rows as means over positions."""

    def means_of(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
        rows, pooled = rows_of(values, step)
        return rows.mean(dim=2, keepdim=True), pooled

    return means_of


def captured_part(progress: Tensor) -> tuple[float, float]:
    """From the first to the end of the last of the steps (S, their progress) that were captured.

    What a recipe knows of one noise level says nothing about another.
    """
    steps = [round(float(at), 6) for at in progress]
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1.0
    return steps[0], min(1.0, round(steps[-1] + last, 6))


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
        sae.decoder[chosen], member, Levels.of(torch.zeros(steps, k, count, 0)), torch.zeros(steps, k, sae.width),
        torch.zeros(steps, k), sae.normalisation, mode, (1.0,) * k,
    )  # fmt: skip
    return with_settings(recipe, strength=strength)


@torch.no_grad()
def fit_thresholds(
    activations: Activations, sae: SparseAutoencoder, features: Tensor, pictures: int = 32
) -> tuple[Tensor, float]:
    """Threshold of each latent (F) whose gate agrees best with TopK on some pictures, and the mean agreement.

    For every latent the rows are sorted by pre-activation; a threshold after row i is right about the active rows
    above it and the inactive rows below, so one cumulative sum finds the best. Of more than `GATED` rows some do,
    evenly spread. Other SAEs have their own thresholds.
    """
    if sae.activation != "topk":
        return sae.gate.expand(sae.latents).cpu()[features], 1.0
    rows, active, own = [], [], features.to(sae.device)
    some = activations.part(0, pictures)
    every = math.ceil(some.rows_in_all / sae.kernel**2 / GATED)
    for s, progress in enumerate(some.progress):
        for _, values in some.batches(s):
            step = sae.normalisation.step_at(float(progress))
            x = sae.rows(values.to(sae.device), step).flatten(0, 1)[::every]
            pre = sae.pre_activations(x, step)
            kth = pre.topk(sae.k, dim=1).values[:, -1:]
            rows.append(pre[:, own].cpu())
            active.append(((pre[:, own] >= kth) & (pre[:, own] > 0)).cpu())
    pre, order = torch.cat(rows).sort(dim=0)
    on = torch.cat(active).gather(0, order).float()
    zero = torch.zeros(1, on.shape[1])
    right = torch.cat([zero, (1 - on).cumsum(0)]) + torch.cat([on.flip(0).cumsum(0).flip(0), zero])
    best = right.argmax(dim=0)
    edges = torch.cat([pre[:1] - 1, (pre[:-1] + pre[1:]) / 2, pre[-1:] + 1])
    threshold = edges.gather(0, best[None])[0].clamp(min=0)
    return threshold, float(right.gather(0, best[None]).mean() / len(pre))
