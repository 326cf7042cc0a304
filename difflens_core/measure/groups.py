"""Fairness beyond one attribute of one set: several attributes at once, several prompts, pictures left undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from torch import Tensor

from ..classifiers import decided
from ..targets import joint_shares
from .fairness import Report, measure_fairness, one_hot
from .intervals import bootstrap_means


@dataclass(frozen=True)
class JointReport:
    """Fairness of several attributes at once. counts: pictures in every cell (K1 x ... x KA).

    report: the same figures as for one attribute, with the cells as classes ("young, light"), in the order of
    counts.ravel().
    """

    attributes: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    counts: np.ndarray
    report: Report


def joint_probabilities(readings: Sequence[np.ndarray]) -> np.ndarray:
    """Probability of every cell (n x K1 x ... x KA) from those of each attribute (n x K1, ..., n x KA).

    Within one picture the attributes are taken to be read independently, which changes nothing for counts.
    """
    return reduce(lambda joint, read: joint[..., None] * np.expand_dims(read, tuple(range(1, joint.ndim))), readings)


def joint_report(
    readings: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[str, ...]],
    target: Mapping[str, np.ndarray] | np.ndarray,
) -> JointReport:
    """Joint table and FD of the attributes in `readings` (each n x K).

    target: the shares (K) of each attribute, whose products are asked of the cells (as many young light as young dark
    pictures), or the shares of the cells themselves (K1 x ... x KA, sum 1). The pictures are taken for independent,
    which makes the intervals of pictures dealt out to classes rather too wide.
    """
    names = tuple(readings)
    if isinstance(target, Mapping):
        target = joint_shares([target[name] for name in names])
    joint = joint_probabilities([np.asarray(read, dtype=np.float64) for read in readings.values()])
    shape = joint.shape[1:]
    cells = tuple(", ".join(cell) for cell in product(*(classes[name] for name in names)))
    flat = joint.reshape(len(joint), -1)
    counts = np.bincount(flat.argmax(axis=1), minlength=math.prod(shape)).reshape(shape)
    report = measure_fairness(flat, np.asarray(target).reshape(-1), " x ".join(names), cells)
    return JointReport(names, tuple(classes[name] for name in names), counts, report)


def clear_pictures(read: Mapping[str, Tensor], attribute: str, least: float = 0.0) -> np.ndarray:
    """Pictures (n, bool) with a face whose likeliest class of `attribute` has a probability of at least `least`."""
    return (decided(read) & (read[attribute].amax(dim=1) >= least)).numpy()


@dataclass(frozen=True)
class UndecidedBounds:
    """Undecided pictures as a class of their own. counts: clear pictures of each class.

    shares: of each class in all n pictures, undecided being the rest; fd_low, fd_high: hard FD of all n pictures if
    the undecided fell in the best and in the worst way.
    """

    n: int
    undecided: int
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    fd_low: float
    fd_high: float


def undecided_bounds(probabilities: np.ndarray, target: np.ndarray, clear: np.ndarray) -> UndecidedBounds:
    """What the undecided could make of the hard FD: n x K probabilities, a target (K), the clear pictures (n, bool)."""
    labels = np.asarray(probabilities).argmax(axis=1)[clear]
    counts = np.bincount(labels, minlength=len(target))
    undecided = len(clear) - len(labels)
    low, high = fd_bounds(counts, undecided, target)
    shares = tuple((counts / len(clear)).tolist())
    return UndecidedBounds(len(clear), undecided, tuple(counts.tolist()), shares, low, high)


def fd_bounds(counts: np.ndarray, undecided: int, target: np.ndarray) -> tuple[float, float]:
    """Lowest and highest hard FD over all ways to give whole `undecided` pictures to the classes of `counts` (K).

    FD^2 is a sum of convex terms, one a class: giving each picture to the class that lacks most is optimal (Gross
    1956), and the highest value is at a corner, where all go to one class.
    """
    target, n = np.asarray(target, dtype=np.float64), int(np.sum(counts)) + undecided
    missing = n * target - counts
    high = max(np.linalg.norm(missing - undecided * corner) for corner in np.eye(len(target)))
    for _ in range(undecided):
        missing[missing.argmax()] -= 1
    return float(np.linalg.norm(missing) / n), float(high / n)


@dataclass(frozen=True)
class PromptReport:
    """FD by prompt. mean: of the prompts' hard FD, each prompt counting the same, with a 95 % interval.

    Few pictures a prompt make every FD, and so the mean, larger than the truth. by_chance is the mean that independent
    pictures from the target mix itself would show at these numbers, to compare with; the interval tells how far the
    mean would move with other pictures. mean_squared is free of that: the mean of FD^2 less what chance adds (None if
    it cannot be known for a prompt, see `unbiased_squared_fd`).
    """

    prompts: tuple[str, ...]
    reports: tuple[Report, ...]
    mean: float
    mean_ci: tuple[float, float]
    by_chance: float
    mean_squared: float | None


def prompt_report(
    probabilities: np.ndarray,
    target: np.ndarray,
    attribute: str,
    classes: tuple[str, ...],
    prompts: Sequence[str],
    assigned: np.ndarray | None = None,
    seed: int = 0,
) -> PromptReport:
    """FD of every prompt and their mean, from n x K probabilities, a target (K) and the prompt of each picture (n).

    assigned: the class that each picture was steered to (n).
    """
    probabilities, target, given = np.asarray(probabilities), np.asarray(target), np.asarray(prompts)
    names = tuple(dict.fromkeys(given.tolist()))
    reports, again, chance = [], [], []
    for number, name in enumerate(names):
        own = given == name
        strata = None if assigned is None else np.asarray(assigned)[own]
        reports.append(measure_fairness(probabilities[own], target, attribute, classes, strata))
        hard, n = one_hot(probabilities[own].argmax(axis=1), len(target)), int(own.sum())
        draws = bootstrap_means(hard, strata, seed=seed + number)
        again.append(np.linalg.norm(draws - target, axis=1))
        fair = np.random.default_rng(seed + number).multinomial(n, target, size=len(draws)) / n
        chance.append(np.linalg.norm(fair - target, axis=1).mean())
    mean, means = float(np.mean([report.fd_hard for report in reports])), np.mean(again, axis=0)
    low, high = np.quantile(means - means.mean(), [0.025, 0.975]) + mean
    squares = [report.fd_squared for report in reports if report.fd_squared is not None]
    squared = float(np.mean(squares)) if len(squares) == len(reports) else None
    return PromptReport(
        names, tuple(reports), mean, (max(0.0, float(low)), float(high)), float(np.mean(chance)), squared
    )
