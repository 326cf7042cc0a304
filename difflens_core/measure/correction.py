"""Class shares and FD as they would be if the classifier made no errors.

A classifier that mistakes 1 in 10 of one class and none of the other sees a bias where there is none. How often it
takes what for what is counted once, on labelled pictures like those measured; then the shares it finds can be corrected
(CLEAM: Teo, Abdollahzadeh and Cheung, "On Measuring Fairness in Generative Models", NeurIPS 2023, arXiv 2310.19297).
It holds as far as the classifier errs on these pictures as it did on the labelled ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from ..files import DiffLensError
from .fairness import fairness_discrepancy, one_hot
from .intervals import DRAWS, bootstrap_means, distance_interval, fd_interval, share_intervals

CONDITION_LIMIT = 10.0
"""Largest condition number. Relative errors of the shares grow by up to as much: at 10 a set of pictures may tell no
more than one a hundredth of its size. For two classes with the same accuracy a it is 1 / (2a - 1): 10 means 0.55."""
NARROWEST = 1e-4  # of an interval within 0..1; what is left of a narrower one says nothing


def parse_confusion(text: str, classes: tuple[str, ...]) -> np.ndarray:
    """Counts (K x K, whole numbers) from what a user types: a line for each true class, a number for each predicted.

    Both in the order of `classes`; a line may begin with the name of its class and a colon. Raises `DiffLensError` if
    a line is not as expected or a class has no labelled picture.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    expected = f"Expected {len(classes)} lines, one for each true class in the order {', '.join(classes)}, each with "
    expected += f"{len(classes)} whole numbers: how many of its pictures the classifier takes for each class."
    if len(lines) != len(classes):
        raise DiffLensError(f"the confusion counts have {len(lines)} lines. {expected}")
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for row, (line, name) in enumerate(zip(lines, classes, strict=True)):
        label, colon, numbers = line.rpartition(":")
        parts = re.split(r"[,;\s]+", numbers.strip())
        fits = len(parts) == len(classes) and all(re.fullmatch(r"\d{1,9}", part) for part in parts)
        if not fits or (colon and label.strip().lower() != name.lower()):
            raise DiffLensError(f'line {row + 1} of the confusion counts, "{line}", is not understood. {expected}')
        counts[row] = [int(part) for part in parts]
    check_labelled(counts, classes)
    return counts


def confusion_counts(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K x K) of labelled pictures: rows true classes, columns predicted ones; n integer labels each."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    return counts


def check_labelled(confusion: np.ndarray, classes: tuple[str, ...]) -> None:
    """Raises `DiffLensError` if a true class has no labelled picture."""
    empty = [name for name, labelled in zip(classes, confusion.sum(axis=1), strict=True) if labelled == 0]
    if empty:
        raise DiffLensError(
            f"the confusion counts hold no labelled picture of {', '.join(empty)}, so that the classifier's errors "
            "there are not known. Label some pictures of every class."
        )


def error_rates(confusion: np.ndarray) -> np.ndarray:
    """P(predicted j | true i) (K x K, rows sum to 1) from confusion counts (K x K)."""
    return confusion / confusion.sum(axis=1, keepdims=True)


def solve_shares(found: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """True shares p (K, sum 1, none negative) that best explain the shares `found` (K): least squares of A^T p = found.

    rates: A = P(predicted j | true i), K x K. For two classes p_0 = (found_0 - A_10) / (A_00 - A_10), kept to 0..1,
    as in CLEAM.
    """
    # The last equation says that shares sum to 1; its weight makes it hold to about one part in a million.
    weight = 1e3
    system = np.vstack([rates.T, np.full(len(found), weight)])
    shares, _ = optimize.nnls(system, np.append(found, weight))
    return shares / shares.sum()


@dataclass(frozen=True)
class Correction:
    """Shares and hard FD after correction for the classifier's errors, with 95 % intervals.

    condition: by how much errors may grow in the correction, at least 1; labelled: pictures of each true class behind
    the confusion counts; plausible: False where the shares found cannot come from the errors counted (the classifier
    errs less or otherwise on these pictures), so that the correction should not be trusted.
    """

    shares: tuple[float, ...]
    shares_ci: tuple[tuple[float, float], ...]
    fd: float
    fd_ci: tuple[float, float]
    condition: float
    labelled: tuple[int, ...]
    plausible: bool


def correct_for_errors(
    labels: np.ndarray,
    target: np.ndarray,
    confusion: np.ndarray,
    classes: tuple[str, ...],
    strata: np.ndarray | None = None,
    seed: int = 0,
) -> Correction:
    """Shares and FD from n predicted labels, a target (K) and confusion counts (K x K, rows true classes).

    strata: the class each steered picture was assigned (n). The intervals come from a bootstrap of the pictures and of
    each row of the confusion counts, so that few labelled pictures make them wide (CLEAM takes the rates for known).
    Raises `DiffLensError` if a class has no labelled picture or if the classifier tells the classes apart too badly
    (`CONDITION_LIMIT`).
    """
    confusion, target = np.asarray(confusion), np.asarray(target, dtype=np.float64)
    check_labelled(confusion, classes)
    rates = error_rates(confusion)
    condition = float(np.linalg.cond(rates))
    if condition > CONDITION_LIMIT:
        raise DiffLensError(
            f"the classifier tells {', '.join(classes)} apart too badly to correct for its errors: they would grow up "
            f"to {condition:.0f} times, {CONDITION_LIMIT:.0f} is the limit. Use a better classifier or merge classes."
        )
    hard = one_hot(labels, len(classes))
    shares = solve_shares(hard.mean(axis=0), rates)
    draws = corrected_draws(hard, confusion, strata, seed)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    fd_low, fd_high = distance_interval(shares, draws, target)
    plausible = bool((np.ptp(np.clip([low, high], 0, 1), axis=0) > NARROWEST).all())
    if not plausible:  # the interval lies outside of 0..1: stretch it to what is true if the classifier makes no errors
        found, found_fd = share_intervals(labels, len(classes), strata), fd_interval(hard, target, strata)
        low, high = np.minimum(low, found[:, 0]), np.maximum(high, found[:, 1])
        fd_low, fd_high = min(fd_low, found_fd[0]), max(fd_high, found_fd[1])
    limits = np.clip(np.stack([np.minimum(low, shares), np.maximum(high, shares)], axis=1), 0, 1)
    farthest = np.linalg.norm(np.eye(len(classes)) - target, axis=1).max()
    return Correction(
        shares=tuple(shares.tolist()),
        shares_ci=tuple((below, above) for below, above in limits.tolist()),
        fd=fairness_discrepancy(shares[None], target),
        fd_ci=(fd_low, min(fd_high, float(farthest))),
        condition=condition,
        labelled=tuple(confusion.sum(axis=1).tolist()),
        plausible=plausible,
    )


def corrected_draws(hard: np.ndarray, confusion: np.ndarray, strata: np.ndarray | None, seed: int) -> np.ndarray:
    """Corrected shares (draws x K, sum 1, some may be negative) of bootstraps of the pictures and the error rates."""
    classes = len(confusion)
    found = bootstrap_means(hard, strata, DRAWS, seed)
    weights = np.random.default_rng(seed + 1).standard_gamma(confusion + 1 / classes, (DRAWS, classes, classes))
    rates = weights / weights.sum(axis=2, keepdims=True)
    return np.linalg.solve(rates.transpose(0, 2, 1), found[..., None])[..., 0]
