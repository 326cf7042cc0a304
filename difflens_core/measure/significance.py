"""Can chance explain what is seen? Tests of class counts, the FD that chance alone gives, and sizes of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .intervals import wilson_interval

SIMULATED = 20_000
FEW = 5  # expected pictures in a class below which chi-square is no good approximation (Cochran 1954)


def chi_square(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pearson's X^2 of counts (... x K) against a target (K) that has a share for every class."""
    expected = counts.sum(axis=-1, keepdims=True) * target
    return ((counts - expected) ** 2 / expected).sum(axis=-1)


def target_p_value(counts: np.ndarray, target: np.ndarray, seed: int = 0) -> float:
    """How often independent pictures from the target mix would stray as far as `counts` (K, whole numbers) do.

    Pearson's chi-square test; where a class is expected fewer than 5 times, against 20 000 simulated samples in place
    of the chi-square distribution (Monte Carlo multinomial test). 0 if a class is shown that the target excludes.
    For pictures dealt out in fixed shares it is rather too large than too small: their mix varies less.
    """
    counts, target = np.asarray(counts), np.asarray(target, dtype=np.float64)
    asked = target > 0
    if counts[~asked].any():
        return 0.0
    if asked.sum() == 1:
        return 1.0
    counts, target = counts[asked], target[asked]
    n = int(counts.sum())
    found = chi_square(counts, target)
    if n * target.min() >= FEW:
        return float(stats.chi2.sf(found, len(target) - 1))
    simulated = chi_square(np.random.default_rng(seed).multinomial(n, target, size=SIMULATED), target)
    return float((1 + np.sum(simulated >= found - 1e-9)) / (1 + SIMULATED))


def fd_threshold(n: int, target: np.ndarray, level: float = 0.95, seed: int = 0) -> float:
    """FD of counts that n independent pictures from the target mix itself (K) stay below, with probability `level`.

    n FD^2 is a sum of chi-squares weighted by the eigenvalues of diag(q) - q q^T. If these are equal (two classes, or
    a uniform target) the quantile is exact; else, and for few pictures, it is that of 20 000 simulated samples.
    """
    target = np.asarray(target, dtype=np.float64)
    asked = target[target > 0]
    if len(asked) == 1:
        return 0.0
    weights = np.linalg.eigvalsh(np.diag(asked) - np.outer(asked, asked))[1:]
    if n * asked.min() >= FEW and np.allclose(weights, weights[0]):
        return float(np.sqrt(weights[0] * stats.chi2.ppf(level, len(weights)) / n))
    simulated = np.random.default_rng(seed).multinomial(n, asked, size=SIMULATED) / n
    return float(np.quantile(np.linalg.norm(simulated - asked, axis=1), level, method="higher"))


def pictures_for_fd(fd: float, target: np.ndarray, level: float = 0.95) -> int:
    """Pictures needed so that an FD of counts of `fd` is above `fd_threshold`, that is, cannot be chance. fd > 0."""
    many = 10**6  # where the threshold falls with the root of the number of pictures
    return max(1, math.ceil(many * (fd_threshold(many, target, level) / fd) ** 2))


def pictures_for_share(half_width: float, level: float = 0.95) -> int:
    """Pictures needed so that no class share's Wilson interval reaches further than `half_width` to either side.

    The interval is widest at a share of one half: half_width = z / (2 sqrt(n + z^2)).
    """
    z = stats.norm.ppf((1 + level) / 2)
    return max(1, math.ceil(z**2 / (4 * half_width**2) - z**2))


@dataclass(frozen=True)
class PairedTest:
    """What became of n pictures that are paired by seed.

    table[i][j]: pictures of class i before and j after. changed: share whose class changed, with a 95 % interval.
    needed: the least share of pictures that must change class to turn the mix before into the target; ratio: changed
    by needed, None where nothing had to change, below 1 only where the target was not reached. p_value: how often
    chance alone would shift the mix as much.
    """

    n: int
    table: tuple[tuple[int, ...], ...]
    changed: float
    changed_ci: tuple[float, float]
    needed: float
    ratio: float | None
    p_value: float
    method: str


def paired_test(before: np.ndarray, after: np.ndarray, target: np.ndarray) -> PairedTest:
    """Did the mix of classes change between two sets of pictures from the same seeds? n integer labels each.

    Two classes: McNemar's exact test (1947). More: Stuart (1955) and Maxwell (1970) on marginal homogeneity. needed
    is the total variation of the mix before from the target (K): each class must give up at least what it has too much.
    """
    target, n = np.asarray(target, dtype=np.float64), len(before)
    table = np.zeros((len(target), len(target)), dtype=np.int64)
    np.add.at(table, (np.asarray(before), np.asarray(after)), 1)
    changes = int(n - np.trace(table))
    needed = float(np.abs(table.sum(axis=1) / n - target).sum() / 2)
    low, high = wilson_interval(changes, n)
    return PairedTest(
        n=n,
        table=tuple(tuple(row) for row in table.tolist()),
        changed=changes / n,
        changed_ci=(float(low), float(high)),
        needed=needed,
        ratio=changes / n / needed if needed > 1e-12 else None,
        p_value=mcnemar(table) if len(target) == 2 else stuart_maxwell(table),
        method="McNemar (exact)" if len(target) == 2 else "Stuart-Maxwell",
    )


def mcnemar(table: np.ndarray) -> float:
    """p-value of a 2 x 2 table of paired counts: of the pictures that changed, half would go either way by chance."""
    return sign_test(int(table[0, 1]), int(table[1, 0]))


def sign_test(one_way: int, other_way: int) -> float:
    """How often chance alone would be as one-sided, if each of these went either way by tossing a coin."""
    return 1.0 if one_way + other_way == 0 else float(stats.binomtest(one_way, one_way + other_way).pvalue)


def stuart_maxwell(table: np.ndarray) -> float:
    """p-value of a K x K table of paired counts: X^2 = d^T S^-1 d with K - 1 degrees of freedom.

    d: pictures of a class before less those after. S_ii = n_i. + n_.i - 2 n_ii and S_ij = -(n_ij + n_ji). Classes that
    no change connects make S of lower rank: the pseudo-inverse is taken and the rank counts as degrees of freedom.
    """
    before, after = table.sum(axis=1), table.sum(axis=0)
    difference = (before - after).astype(np.float64)
    covariance = np.diag(before + after) - table - table.T
    rank = np.linalg.matrix_rank(covariance)
    if rank == 0:
        return 1.0
    return float(stats.chi2.sf(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference, rank))
