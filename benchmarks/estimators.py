"""Do the intervals and tests of a fairness report hold as often as they say? Answered by simulation, in two tables.

    python benchmarks/estimators.py                10 000 simulated sets of pictures a row, about half a minute
    python benchmarks/estimators.py --draws 1000

Every row draws sets of pictures from a known mix. `found` counts how often the 95 % interval holds the truth, or how
often a test at 5 % calls a fair model unfair. Sets that come out the same are measured once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from difflens_core.measure import (  # noqa: E402
    Correction,
    correct_for_errors,
    fd_interval,
    one_hot,
    share_intervals,
    stuart_maxwell,
    target_p_value,
)

CLASSES = ("a", "b", "c")
THIRDS, FAIR = np.full(3, 1 / 3), (1 / 3, 1 / 3, 1 / 3)
MISSES = np.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.03, 0.96]])  # what pictures steered to a class show
MOVES = np.array([[0.2, 0.12, 0.02], [0.02, 0.2, 0.12], [0.12, 0.02, 0.18]])  # classes before and after, the mix kept
RATES = np.array([[0.85, 0.15], [0.03, 0.97]])  # P(predicted | true) of the classifier that is corrected
SEEN, LABELLED = 500, 100  # pictures, and labelled pictures of each class, of a correction


def how_often(sets: np.ndarray, happens: Callable[[np.ndarray], np.ndarray | bool]) -> np.ndarray:
    """Share of `sets` (draws x ...) for which something happens, or the mean of several numbers."""
    outcomes, times = np.unique(sets, axis=0, return_counts=True)
    return np.average([happens(outcome) for outcome in outcomes], weights=times, axis=0)


def labels_of(counts: np.ndarray) -> np.ndarray:
    """Integer labels of pictures with these `counts` (... x K)."""
    return np.concatenate([np.repeat(np.arange(len(row)), row) for row in np.atleast_2d(counts)])


def holds(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] - 1e-12 <= truth <= interval[1] + 1e-12


def fd_rate(draws: int, n: int, shares: tuple[float, ...], rng: np.random.Generator) -> float:
    """How often the interval of FD holds the truth, of n independent pictures."""
    truth = float(np.linalg.norm(np.array(shares) - THIRDS))
    sets = rng.multinomial(n, shares, size=draws)
    return how_often(sets, lambda counts: holds(fd_interval(one_hot(labels_of(counts), 3), THIRDS), truth))


def dealt_rates(draws: int, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """How often the intervals of FD and of the first share hold the truth, of pictures dealt out evenly to classes."""
    truth, strata = MISSES.mean(axis=0), np.repeat(np.arange(3), per_class)
    fd = float(np.linalg.norm(truth - THIRDS))

    def held(counts: np.ndarray) -> list[bool]:
        labels = labels_of(counts)
        share = share_intervals(labels, 3, strata)[0]
        return [holds(fd_interval(one_hot(labels, 3), THIRDS, strata), fd), holds(share, truth[0])]

    return how_often(np.stack([rng.multinomial(per_class, row, size=draws) for row in MISSES], axis=1), held)


def share_rate(draws: int, n: int, share: float, rng: np.random.Generator) -> float:
    """How often the interval of a share holds the truth, of n independent pictures."""
    sets = rng.multinomial(n, [share, 1 - share], size=draws)
    return how_often(sets, lambda counts: holds(share_intervals(labels_of(counts), 2)[0], share))


def false_alarms(draws: int, n: int, target: tuple[float, ...], rng: np.random.Generator) -> float:
    """How often n pictures from the target mix are told from it."""
    return how_often(rng.multinomial(n, target, size=draws), lambda c: target_p_value(c, np.array(target)) < 0.05)


def false_shifts(draws: int, n: int, rng: np.random.Generator) -> float:
    """How often the mix of n pairs is called shifted though it is the same before and after."""
    sets = rng.multinomial(n, MOVES.ravel(), size=draws).reshape(-1, 3, 3)
    return float(np.mean([stuart_maxwell(table) < 0.05 for table in sets]))


def correction_row(draws: int, share: float, rng: np.random.Generator) -> list[float]:
    """Mean share of a class as found and corrected, and how often the intervals of both hold the true `share`."""
    seen = rng.multinomial(SEEN, np.array([share, 1 - share]) @ RATES, size=draws)
    confusion = np.stack([rng.multinomial(LABELLED, row, size=draws) for row in RATES], axis=1)

    def outcome(counts: np.ndarray) -> list[float]:
        labels = labels_of(counts[0])
        result: Correction = correct_for_errors(labels, np.full(2, 0.5), counts[1:], CLASSES[:2])
        raw = holds(share_intervals(labels, 2)[0], share)
        return [np.mean(labels == 0), result.shares[0], raw, holds(result.shares_ci[0], share)]

    return how_often(np.concatenate([seen[:, None], confusion], axis=1), outcome).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    draws, rng, began = parser.parse_args().draws, np.random.default_rng(0), time.time()
    print(f"{draws} simulated sets a row, in %{'':30} stated  found")

    def row(name: str, stated: int, found: float) -> None:
        print(f"{name:58} {stated:6d} {100 * found:6.1f}", flush=True)

    row("interval of a share of 5 %, 200 pictures", 95, share_rate(draws, 200, 0.05, rng))
    row("interval of FD, mix 70/20/10, 100 pictures", 95, fd_rate(draws, 100, (0.7, 0.2, 0.1), rng))
    row("interval of FD, mix 40/33/27, 100 pictures", 95, fd_rate(draws, 100, (0.4, 0.33, 0.27), rng))
    row("interval of FD, fair mix, 100 pictures", 95, fd_rate(draws, 100, FAIR, rng))
    dealt_fd, dealt_share = dealt_rates(draws, 50, rng)
    row("interval of FD, 50 dealt to each of 3 classes, few misses", 95, dealt_fd)
    row("interval of a share, the same pictures", 95, dealt_share)
    row("chi-square test, fair mix, 200 pictures", 5, false_alarms(draws, 200, FAIR, rng))
    row("chi-square test, target 60/25/10/5, 200 pictures", 5, false_alarms(draws, 200, (0.6, 0.25, 0.1, 0.05), rng))
    row("the same by simulation, fair mix, 12 pictures", 5, false_alarms(draws, 12, FAIR, rng))
    row("test of pairs, mix kept, 300 pairs", 5, false_shifts(draws, 300, rng))
    accuracy = " and ".join(f"{100 * RATES[c, c]:.0f} %" for c in (0, 1))
    print(f"\nclassifier right on {accuracy}; {SEEN} pictures, {LABELLED} labelled a class; shares of class a, in %")
    print("true  as found  corrected  interval as found holds  corrected holds  (stated 95)")
    for share in (0.5, 0.8):
        raw, corrected, raw_holds, holds_now = (100 * value for value in correction_row(draws, share, rng))
        print(f"{100 * share:4.0f}  {raw:8.1f}  {corrected:9.1f}  {raw_holds:23.1f}  {holds_now:15.1f}", flush=True)
    print(f"\n{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
