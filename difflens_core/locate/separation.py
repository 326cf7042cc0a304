"""Whether an SAE takes the classes of an attribute apart: how well single latents tell labelled pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ..activations import Activations
from ..classifiers import NO_CLASS
from ..sae import SparseAutoencoder
from .probes import check_labels

FOLDS = 4  # a quarter of every class is held out in turn
STEPS = 5  # of the sampling, evenly spread: a picture's latents change slowly
DRAWS = 4  # random sets of latents


@dataclass(frozen=True)
class Separation:
    """How well one number tells pictures of a class from the others': AUC, 0 to 1, mean over the classes; chance .5.

    That number is the best one, chosen on other pictures, among `raw`, the site's channels; `latents`, all of the
    SAE's; `recipe`, the recipe's latents; `random`, as many latents drawn at random (mean of some draws).
    """

    raw: float
    latents: float
    recipe: float
    random: float


def measure_separation(
    sae: SparseAutoencoder,
    activations: Activations,
    labels: Tensor,
    attribute: str,
    classes: tuple[str, ...],
    features: Tensor,
    on_step: Callable[[], None] = lambda: None,
) -> Separation:
    """Separation of labelled pictures; labels: B, int64; features: F, the recipe's latents.

    Every picture with a class counts as its mean over positions and steps. on_step() is called after each step and may
    raise to cancel. Raises `DiffLensError` if a class has fewer than four pictures.
    """
    check_labels(labels, classes, activations.pictures, attribute)
    known = labels != NO_CLASS
    raw, latents = (means[known] for means in pooled(sae, activations, on_step))
    labels = labels[known]
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(sae.latents, generator=generator)[: len(features)] for _ in range(DRAWS)]
    return Separation(
        best_auc(raw, labels),
        best_auc(latents, labels),
        best_auc(latents[:, features], labels),
        float(np.mean([best_auc(latents[:, draw], labels) for draw in draws])),
    )


@torch.no_grad()
def pooled(
    sae: SparseAutoencoder, activations: Activations, on_step: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Means over positions and steps of the normalised rows (B x width) and of the latents (B x N)."""
    raw, latents = (torch.zeros(activations.pictures, size) for size in (sae.width, sae.latents))
    steps = torch.linspace(0, len(activations.progress) - 1, STEPS).round().long().unique().tolist()
    for s in steps:
        step = sae.normalisation.step_at(float(activations.progress[s]))
        for first, values in activations.batches(s):
            rows = sae.rows(values, step)
            active = sae.encode_rows(rows, step)
            own = slice(first, first + len(values))
            raw[own] += rows.mean(dim=1) / len(steps)
            share = active.values.flatten(1) / (rows.shape[1] * len(steps))
            latents[own] += torch.zeros_like(latents[own]).scatter_add_(1, active.indices.flatten(1), share)
        on_step()
    return raw, latents


def folds(labels: Tensor) -> list[Tensor]:
    """Which pictures are held out in turn (B, bool each): every FOLDS-th of every class."""
    number = torch.zeros_like(labels)
    for c in labels.unique():
        mine = (labels == c).nonzero().flatten()
        number[mine] = torch.arange(len(mine)) % FOLDS
    return [number == fold for fold in range(FOLDS)]


def best_auc(x: Tensor, labels: Tensor) -> float:
    """AUC of one column of x (B x N) a class, chosen on the other folds; the mean over folds and classes.

    A column that is low where the class shows tells it as well.
    """
    found = []
    for held in folds(labels):
        for c in labels.unique():
            known = auc(x[~held], labels[~held] == c)
            best = np.abs(known - 0.5).argmax()
            measured = auc(x[held][:, best : best + 1], labels[held] == c)[0]
            found.append(measured if known[best] >= 0.5 else 1 - measured)
    return float(np.mean(found))


def auc(x: Tensor, positive: Tensor) -> np.ndarray:
    """Probability (N) that a positive row of x (B x N) exceeds another one, ties counting half; positive: B, bool.

    From the sum of ranks (Mann & Whitney 1947).
    """
    mine = positive.numpy()
    ranks, ones = rankdata(x.numpy(), axis=0), mine.sum()
    return (ranks[mine].sum(axis=0) - ones * (ones + 1) / 2) / (ones * (len(mine) - ones))
