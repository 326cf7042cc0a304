"""How far a set of pictures is from a target mix, with how sure one can be, and what else changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from .classifier import decided, other_attributes


def fairness_discrepancy(probabilities: np.ndarray, target: np.ndarray) -> float:
    """FD = sqrt(sum_c (mean_i p_c(x_i) - target_c)^2) (Choi et al. 2020). 0 is perfect.

    probabilities: n x K, soft (softmax) or hard (one-hot); target: K. At most sqrt(1 + max) for a one-class mix.
    """
    return float(np.linalg.norm(np.mean(probabilities, axis=0) - np.asarray(target)))


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """n integer labels to n x K."""
    return np.eye(classes)[np.asarray(labels)]


def bootstrap_interval(
    probabilities: np.ndarray,
    target: np.ndarray,
    strata: np.ndarray | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of FD, resampling pictures (within `strata`, if given: n integer labels).

    Steered pictures are assigned classes in fixed shares, so they are resampled within their assigned class.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    strata = np.zeros(len(probabilities), dtype=int) if strata is None else np.asarray(strata)
    rng = np.random.default_rng(seed)
    totals = np.zeros((draws, probabilities.shape[1]))
    for stratum in np.unique(strata):
        members = probabilities[strata == stratum]
        # Resampling with replacement only needs how often each picture was drawn.
        times = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
        totals += times @ members
    fds = np.linalg.norm(totals / len(probabilities) - target, axis=1)
    low, high = np.quantile(fds, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fair_threshold(n: int, classes: int, level: float = 0.95) -> float:
    """Hard FD below which n independent pictures cannot be told from a uniform mix (chi-square test)."""
    return float(np.sqrt(stats.chi2.ppf(level, classes - 1) / (n * classes)))


@dataclass(frozen=True)
class Report:
    """Fairness of one set of pictures for one attribute.

    shares: of each class by hard count; fd / fd_hard: soft and hard FD with 95 % intervals; threshold: see
    `fair_threshold`; success: share that shows the class it was assigned, None for unsteered pictures.
    """

    attribute: str
    classes: tuple[str, ...]
    n: int
    target: tuple[float, ...]
    shares: tuple[float, ...]
    fd: float
    fd_ci: tuple[float, float]
    fd_hard: float
    fd_hard_ci: tuple[float, float]
    threshold: float
    success: float | None = None


def measure_fairness(
    probabilities: np.ndarray,
    target: np.ndarray,
    attribute: str,
    classes: tuple[str, ...],
    assigned: np.ndarray | None = None,
) -> Report:
    """Report on n x K class probabilities; `assigned` holds the class that each picture was steered to (n)."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    labels = probabilities.argmax(axis=1)
    hard = one_hot(labels, len(classes))
    return Report(
        attribute,
        tuple(classes),
        len(labels),
        tuple(float(share) for share in target),
        tuple(float(share) for share in hard.mean(axis=0)),
        fairness_discrepancy(probabilities, target),
        bootstrap_interval(probabilities, target, assigned),
        fairness_discrepancy(hard, target),
        bootstrap_interval(hard, target, assigned),
        fair_threshold(len(labels), len(classes)),
        None if assigned is None else float(np.mean(labels == assigned)),
    )


def kept_attributes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], steered: str) -> dict[str, float]:
    """Share of pictures, paired by seed, that keep their class, for every attribute but the steered one.

    before, after: what a classifier reads off the same n pictures without and with an edit. Pictures without a face in
    either do not count; empty if none is left.
    """
    known = decided(before) & decided(after)
    attributes = {name: read for name, read in before.items() if read.ndim == 2} if known.any() else {}
    return {
        name: kept_share(before[name][known].argmax(1).numpy(), after[name][known].argmax(1).numpy())
        for name in other_attributes(attributes, steered)
    }


def kept_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pictures, paired by seed, whose class is the same in both (n integer labels each)."""
    return float(np.mean(np.asarray(before) == np.asarray(after)))


def pixel_change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over pictures of the root mean square pixel difference; pictures in [0, 1], paired by seed."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    axes = tuple(range(1, difference.ndim))
    return float(np.sqrt((difference**2).mean(axis=axes)).mean())
