"""How sure one can be of class shares and of the Fairness Discrepancy (FD), also when every picture shows the same.

Pictures without steering are independent draws. Steered pictures are dealt out to classes in fixed shares, so that
chance only acts within the pictures of one assigned class: these are the `strata` of the functions below.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

DRAWS = 2000
BLOCK = 2**21  # random numbers held at a time


def wilson_interval(count: np.ndarray | float, n: int, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a share of which `count` in n pictures were seen (Wilson 1927); never of zero width. Broadcasts."""
    z = stats.norm.ppf((1 + level) / 2)
    share = np.asarray(count, dtype=np.float64) / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def share_intervals(
    labels: np.ndarray, classes: int, strata: np.ndarray | None = None, level: float = 0.95
) -> np.ndarray:
    """Interval of every class's share (K x 2) from n integer labels.

    Without strata Wilson's. With them (n integer labels) the Wilson intervals of the strata are put together by how
    far each reaches from its own share (MOVER, Zou and Donner 2008; for strata Yan and Su 2010). As no Wilson interval
    has zero width, neither has the sum, even if every picture shows the class it was assigned.
    """
    labels = np.asarray(labels)
    estimate, below, above = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    for members in by_stratum(labels, strata):
        counts, weight = np.bincount(members, minlength=classes), len(members) / len(labels)
        share, (low, high) = counts / len(members), wilson_interval(counts, len(members), level)
        estimate += weight * share
        below += (weight * (share - low)) ** 2
        above += (weight * (high - share)) ** 2
    return np.clip(np.stack([estimate - np.sqrt(below), estimate + np.sqrt(above)], axis=1), 0, 1)


def by_stratum(values: np.ndarray, strata: np.ndarray | None) -> list[np.ndarray]:
    """The rows of `values` of each stratum; all of them in one without strata."""
    return [values] if strata is None else [values[np.asarray(strata) == s] for s in np.unique(strata)]


def bootstrap_means(
    probabilities: np.ndarray, strata: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Mean probabilities (draws x K) of re-weighted pictures, each stratum for itself: a Bayesian bootstrap.

    probabilities: n x K. Pictures get random Dirichlet weights (Rubin 1981) in place of whole numbers, and every
    stratum one more picture, spread evenly over the classes, so that a class that nobody showed is not taken for
    impossible. For one-hot rows that is the posterior Dirichlet(counts + 1/K) of Berger, Bernardo and Sun (2015).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    classes = probabilities.shape[1]
    rng = np.random.default_rng(seed)
    means = np.zeros((draws, classes))
    for members in by_stratum(probabilities, strata):
        rows, times = np.unique(np.concatenate([members, np.eye(classes)]), axis=0, return_inverse=True)
        extra = np.concatenate([np.ones(len(members)), np.full(classes, 1 / classes)])
        mass = np.bincount(times.reshape(-1), weights=extra)  # equal pictures are drawn together
        step = max(1, BLOCK // len(rows))
        for first in range(0, draws, step):
            weights = rng.standard_gamma(mass, size=(min(step, draws - first), len(rows)))
            found = weights @ rows / weights.sum(axis=1, keepdims=True)
            means[first : first + step] += found * len(members) / len(probabilities)
    return means


def distance_interval(
    estimate: np.ndarray, draws: np.ndarray, target: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the distance of the true shares from `target` from an estimate (K) and draws around it (D x K).

    Chance moves any set of pictures away from the target, and a bootstrap does so a second time: near 0 its
    percentiles lie too high. So the low end takes chance out: if `u` points from the target to the estimate and `e` is
    an error, the true distance t with |t u + e| = |estimate - target| is found for every draw. It is 0 about where a
    test at 5 % cannot exclude the target. The high end is the percentile, which can only be too careful.
    """
    gap = estimate - target
    found = float(np.linalg.norm(gap))
    high = float(np.quantile(np.linalg.norm(draws - target, axis=1), (1 + level) / 2))
    if found == 0:
        return 0.0, high
    errors = estimate - draws
    along = errors @ gap / found
    across = (errors**2).sum(axis=1) - along**2
    true = np.sqrt(np.maximum(found**2 - across, 0)) - along
    low = np.quantile(np.where(across > found**2, 0, true), (1 - level) / 2)
    return float(np.clip(low, 0, found)), max(high, found)


def fd_interval(
    probabilities: np.ndarray, target: np.ndarray, strata: np.ndarray | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of FD from n x K probabilities (soft, or one-hot for counts) and a target (K).

    strata: the class that each steered picture was assigned (n integer labels). Never of zero width.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    draws = bootstrap_means(probabilities, strata, seed=seed)
    return distance_interval(probabilities.mean(axis=0), draws, np.asarray(target), level)
