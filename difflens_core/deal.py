"""Rounds: orders of classes that are balanced wherever one looks, and of which several do not confound each other.

A round holds every class as often as its share says and is repeated for ever. A run begins at a random place of it,
so that the chance of a class is its share for every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from math import ceil, floor, gcd
from random import Random

import numpy as np

WINDOWS = (16, 60, 240)  # pictures in a row for which rounds beside each other are compared with independent shuffles
SHORTEST, SHORTEST_BESIDE, LONGEST = 60, 600, 1000  # pictures of a round
TRIES, ORDERS = 200, 16  # for each width: starts at most, and complete orders
INDEPENDENT = 0.9  # confounding that is small enough; that of shuffles is 1


def deal_round(shares: Sequence[float], random: Random, beside: Sequence[np.ndarray] = ()) -> np.ndarray:
    """A round (N, int64) of classes with `shares` (K, sum 1), beside rounds that were dealt before, in their order.

    N is a multiple of the lengths of `beside`, and one with which the shares are whole pictures, if a short one does.
    If not, chance decides where the parts of pictures go, so that the expected shares are exact.
    """
    base = len(beside[-1]) if beside else 1
    shortest = SHORTEST_BESIDE if beside else SHORTEST
    lengths = range(base * ceil(shortest / base), max(LONGEST, base) + 1, base)
    length = min(lengths, key=lambda n: round(max(abs(n * share - round(n * share)) for share in shares), 6))
    return balanced(whole_counts(shares, length, random), random, [np.resize(other, length) for other in beside])


def whole_counts(shares: Sequence[float], count: int, random: Random) -> np.ndarray:
    """Pictures (K, int64) of each class among `count`: its quota rounded up or down, and the quota on average."""
    start = random.random()
    ends = [floor(round(end * count, 6) + start) for end in accumulate(shares)]
    ends[-1] = count
    return np.diff(ends, prepend=0)


def balanced(counts: np.ndarray, random: Random, beside: Sequence[np.ndarray] = ()) -> np.ndarray:
    """A round (N, int64) that holds class k `counts[k]` times; beside: rounds of the same length.

    In any run of n pictures a class strays from its share n * counts[k] / N by 1 picture at most where such a round
    is found, and else by as little as the search finds. Two classes can always do with 1; more of them seldom can
    (Fraenkel 1973), but always with 2 - 1 / (K - 1) (Tijdeman 1980). Rounds that stray so little are so regular that
    two of them may confound each other wherever one begins (three equal classes twice do). So a round beside others
    may stray by more, up to 2, where it must to have no more to do with them than a shuffled one has.
    """
    classes = np.flatnonzero(counts)
    parts = [int(counts[k]) // gcd(*map(int, counts)) for k in classes]
    whole, length = sum(parts), int(np.sum(counts))
    if len(parts) < 2:
        return np.full(length, classes[0] if len(classes) else 0)
    groups = [other for other in beside if np.ptp(other)]
    if len(groups) > 1:
        groups.append(np.unique(np.stack(groups), axis=1, return_inverse=True)[1].ravel())
    widest = 2 if groups else 2 - 1 / (len(parts) - 1)
    best, found = np.inf, None
    for limit in np.linspace(1, widest, 5 if widest > 1 else 1):
        stray = int(limit * whole + 1e-9)
        starts = ([-floor(random.random() * (stray + 1)) for _ in parts] for _ in range(TRIES))
        orders = (lay(parts, length, low, stray, random, groups) for low in starts)
        for order in islice((order for order in orders if order is not None), ORDERS):
            worst = max((confounding(order, group) for group in groups), default=0.0)
            if worst < best:
                best, found = worst, order
            if best <= INDEPENDENT:
                return classes[found]
    if found is None:
        found = lay(parts, length, [-whole] * len(parts), 2 * whole, None, [])
    return classes[found]


def lay(
    parts: Sequence[int], length: int, low: Sequence[int], stray: int, random: Random | None, groups: list[np.ndarray]
) -> np.ndarray | None:
    """Lay out a round picture by picture, or None where that comes to a dead end.

    A class's lead over its share, in parts of a picture (`sum(parts)` of them make one), stays between low[k] and
    low[k] + stray. Its next picture therefore has a first and a last place. Among the classes whose first place has
    come and that leave the others time, chance decides; in a round beside others, the class that was seen the least
    with what the others show here. Without `random` the one with the earliest last place is taken, which finds an
    order whenever there is one.
    """
    whole, each = sum(parts), range(len(parts))
    given, ends = [0] * len(parts), [length * part // whole for part in parts]

    def places(k: int) -> tuple[int, int]:
        if given[k] == ends[k]:
            return length, 2 * length
        first = -((low[k] + stray - (given[k] + 1) * whole) // parts[k]) - 1
        return first, min((given[k] * whole - low[k]) // parts[k], length - 1)

    window, order = [places(k) for k in each], np.empty(length, dtype=np.int64)
    missing = [np.zeros((group.max() + 1, len(parts))).tolist() for group in groups]
    shown = [group.tolist() for group in groups]
    for t in range(length):
        now = [lacks[group[t]] for lacks, group in zip(missing, shown, strict=True)]
        chosen = [k for k in each if window[k][0] <= t]
        if random is None:
            chosen.sort(key=lambda k: window[k][1])
        elif len(chosen) > 1:
            later = [lacks[group[(t + 1) % length]] for lacks, group in zip(missing, shown, strict=True)]
            gain = [
                sum(soon[k] - row[k] for soon, row in zip(later, now, strict=True)) + 1e-6 * random.random()
                for k in each
            ]
            chosen.sort(key=gain.__getitem__)
        for k in chosen:
            before, given[k] = window[k], given[k] + 1
            window[k] = places(k)
            if all(last > t + after for after, last in enumerate(sorted(last for _, last in window))):
                break
            window[k], given[k] = before, given[k] - 1
        else:
            return None
        order[t] = k
        for row in now:
            for other in each:
                row[other] += parts[other] / whole
            row[k] -= 1
    return order


def confounding(order: np.ndarray, other: np.ndarray) -> float:
    """How much two rounds of one length have to do with each other: chi-square, as a multiple of that of shuffles.

    Mean over all runs of so many pictures, at the length of `WINDOWS` where it is the greatest.
    """
    mine, theirs = np.eye(order.max() + 1)[order], np.eye(other.max() + 1)[other]
    expected = np.outer(theirs.mean(axis=0), mine.mean(axis=0))
    there = expected > 0
    excess = (theirs[:, :, None] * (mine - mine.mean(axis=0))[:, None])[:, there]
    total = np.cumsum(np.concatenate([excess, excess]), axis=0)
    freedom = (np.count_nonzero(expected.any(axis=1)) - 1) * (np.count_nonzero(expected.any(axis=0)) - 1)
    length, found = len(order), []
    for n in WINDOWS:
        if n < length:
            runs = total[n : n + length] - total[:length]
            found.append((runs**2 / (n * expected[there])).sum(axis=1).mean() / freedom)
    return round(max(found, default=0.0), 6)  # the last bits are not the same on every machine
