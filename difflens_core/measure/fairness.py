"""How far a set of pictures is from a target mix, with how sure one can be, and what else changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special
from torch import Tensor

from ..classifiers import decided, other_attributes
from .intervals import by_stratum, fd_interval, share_intervals
from .significance import fd_threshold, target_p_value

SMALL_FD = 0.05  # a discrepancy that few would mind: 46 to 54 % of two classes
# What pictures say about a target. OPEN: the target is not excluded, but there are too few to tell that it is met.
REACHED, OPEN, MISSED = "reached", "not excluded", "missed"


def fairness_discrepancy(probabilities: np.ndarray, target: np.ndarray) -> float:
    """FD = sqrt(sum_c (mean_i p_c(x_i) - target_c)^2) (Choi et al. 2020). 0 is perfect.

    probabilities: n x K, soft (softmax) or hard (one-hot); target: K. At most sqrt(1 + max) for a one-class mix.
    """
    return float(np.linalg.norm(np.mean(probabilities, axis=0) - np.asarray(target)))


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """n integer labels to n x K."""
    return np.eye(classes)[np.asarray(labels)]


def unbiased_squared_fd(
    probabilities: np.ndarray, target: np.ndarray, strata: np.ndarray | None = None
) -> float | None:
    """FD^2 less what chance adds to it, so that sets of different size compare; may be negative near a fair mix.

    Chance adds the variance of the mean: for counts sum_c p_c (1 - p_c) / (n - 1). With strata (n integer labels) it is
    that within them. None where a stratum holds one picture only, whose variance cannot be known.
    """
    groups = by_stratum(np.asarray(probabilities, dtype=np.float64), strata)
    if min(len(group) for group in groups) < 2:
        return None
    n = len(probabilities)
    chance = sum(len(group) * group.var(axis=0, ddof=1).sum() / n**2 for group in groups)
    return float(fairness_discrepancy(probabilities, target) ** 2 - chance)


def total_variation(shares: np.ndarray, target: np.ndarray) -> float:
    """Share of pictures that would have to change class to make one mix the other: half of sum_c |p_c - q_c|."""
    return float(np.abs(np.asarray(shares) - np.asarray(target)).sum() / 2)


def kl_divergence(shares: np.ndarray, target: np.ndarray) -> float:
    """KL(p || q) = sum_c p_c log(p_c / q_c) in nats; infinite if a class is shown that the target excludes."""
    return float(special.rel_entr(shares, target).sum())


def deviation_ratio(shares: np.ndarray, target: np.ndarray) -> float:
    """Largest deviation of a class from its target by the largest there can be: max_c |p_c - q_c| / (1 - min_c q_c).

    0 to 1. For a uniform target of C classes it is max_c |p_c - 1/C| / (1 - 1/C), as published for SDisc. A mix strays
    farthest if all pictures show the class with the lowest target, hence the divisor for other targets.
    """
    return float(np.abs(np.asarray(shares) - np.asarray(target)).max() / (1 - np.min(target)))


def worst_off_class(shares: np.ndarray, target: np.ndarray) -> tuple[int, float]:
    """The class with the lowest share by its target, and this ratio (1: as asked for, 0: not shown at all)."""
    shares, target = np.asarray(shares), np.asarray(target)
    ratios = np.divide(shares, target, out=np.full(len(target), np.inf), where=target > 0)
    return int(ratios.argmin()), float(ratios.min())


@dataclass(frozen=True)
class Report:
    """Fairness of one set of pictures for one attribute. Intervals hold the truth 95 times in 100.

    shares: of each class by hard count, with intervals; fd / fd_hard: soft and hard FD with intervals; threshold:
    hard FD that independent pictures from the target mix stay below 95 times in 100; p_value: how often such pictures
    would stray as far (`target_p_value`); fd_squared: `unbiased_squared_fd` of the counts; kl: None if infinite;
    worst_off: the class with the lowest share by its target, and the ratio; success: share that shows the class it
    was assigned, with interval, None for unsteered pictures.
    """

    attribute: str
    classes: tuple[str, ...]
    n: int
    target: tuple[float, ...]
    shares: tuple[float, ...]
    shares_ci: tuple[tuple[float, float], ...]
    fd: float
    fd_ci: tuple[float, float]
    fd_hard: float
    fd_hard_ci: tuple[float, float]
    fd_squared: float | None
    threshold: float
    p_value: float
    total_variation: float
    kl: float | None
    deviation_ratio: float
    worst_off: str
    worst_off_ratio: float
    success: float | None = None
    success_ci: tuple[float, float] | None = None


def outcome(report: Report, margin: float = SMALL_FD) -> str:
    """REACHED, OPEN or MISSED.

    A target is reached where the 95 % interval of the counted FD ends below `margin`: it is not enough that the
    interval is so wide that it holds the target. It is missed where chance is a poor explanation of the distance.
    """
    low, high = report.fd_hard_ci
    if high <= margin:
        return REACHED
    return MISSED if low > 0 or report.p_value < 0.05 else OPEN


def measure_fairness(
    probabilities: np.ndarray,
    target: np.ndarray,
    attribute: str,
    classes: tuple[str, ...],
    assigned: np.ndarray | None = None,
) -> Report:
    """Report on n x K class probabilities and a target (K); `assigned` holds the class each picture was steered to (n).

    The threshold and the p-value take the pictures for independent. Pictures dealt out to classes vary less, so that
    both are careful for them; the intervals know of the deal.
    """
    probabilities, target = np.asarray(probabilities, dtype=np.float64), np.asarray(target, dtype=np.float64)
    labels = probabilities.argmax(axis=1)
    hard = one_hot(labels, len(classes))
    shares, kl = hard.mean(axis=0), kl_divergence(hard.mean(axis=0), target)
    worst, worst_ratio = worst_off_class(shares, target)
    hits = None if assigned is None else labels == np.asarray(assigned)
    return Report(
        attribute=attribute,
        classes=tuple(classes),
        n=len(labels),
        target=tuple(target.tolist()),
        shares=tuple(shares.tolist()),
        shares_ci=tuple((low, high) for low, high in share_intervals(labels, len(classes), assigned).tolist()),
        fd=fairness_discrepancy(probabilities, target),
        fd_ci=fd_interval(probabilities, target, assigned),
        fd_hard=fairness_discrepancy(hard, target),
        fd_hard_ci=fd_interval(hard, target, assigned),
        fd_squared=unbiased_squared_fd(hard, target, assigned),
        threshold=fd_threshold(len(labels), target),
        p_value=target_p_value(hard.sum(axis=0).astype(np.int64), target),
        total_variation=total_variation(shares, target),
        kl=kl if np.isfinite(kl) else None,
        deviation_ratio=deviation_ratio(shares, target),
        worst_off=classes[worst],
        worst_off_ratio=worst_ratio,
        success=None if hits is None else float(hits.mean()),
        success_ci=None if hits is None else tuple(share_intervals(hits.astype(int), 2, assigned)[1].tolist()),
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
