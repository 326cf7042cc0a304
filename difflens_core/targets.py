"""Which class each picture of a run is asked to show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from .files import DiffLensError


def parse_target(text: str, classes: tuple[str, ...]) -> np.ndarray:
    """Class shares (K, sum 1) from what a user types.

    "uniform"; the name of one class; shares in the order of `classes` ("0.7, 0.3" or "7 3");
    or named shares ("young: 1, senior: 3", the others 0).
    """
    text = text.strip().lower()
    names = [name.lower() for name in classes]
    if text in ("", "uniform"):
        return np.full(len(classes), 1 / len(classes))
    if text in names:
        return np.eye(len(classes))[names.index(text)]
    try:
        if ":" in text:
            named = dict(part.split(":") for part in re.split(r"[,;\n]+", text) if part.strip())
            shares = {name.strip(): float(share) for name, share in named.items()}
            if not set(shares) <= set(names):
                raise ValueError
            numbers = [shares.get(name, 0.0) for name in names]
        else:
            numbers = [float(part) for part in re.split(r"[,;\s]+", text)]
        if len(numbers) != len(classes) or min(numbers) < 0 or not np.isfinite(sum(numbers)) or sum(numbers) <= 0:
            raise ValueError
    except ValueError:
        raise DiffLensError(
            f'target "{text}" is not understood. Expected "uniform", one of the classes ({", ".join(classes)}), '
            f'or {len(classes)} shares such as "{", ".join(["1"] * len(classes))}".'
        ) from None
    return np.asarray(numbers) / sum(numbers)


def parse_numbers(text: str, classes: Sequence[str], what: str, kind: type = float) -> list:
    """A number of `kind` for each of `classes` from what a user types: one for all, or one each in their order.

    Whole numbers must not be negative. `what` names the numbers in the error.
    """
    try:
        numbers = [kind(part) for part in re.split(r"[,;\s]+", text.strip())]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= len(classes)
    if len(numbers) != len(classes) or not np.isfinite(numbers).all() or (kind is int and min(numbers) < 0):
        raise DiffLensError(
            f'{what} "{text}" is not understood. Expected {"a whole" if kind is int else "one"} number for all, '
            f"or {len(classes)} in the order {', '.join(classes)}."
        )
    return numbers


def assign_targets(shares: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Class (int64) of pictures 0 .. count-1, stratified: every prefix is as close to `shares` as whole pictures allow.

    Among the classes that lag enough behind their share of the first i+1 pictures, picture i goes to the one that
    would fall too far behind soonest. No count of K classes then ever strays from its share by more than
    1 - 1 / (2K - 2) pictures, the best that any deal can promise (Tijdeman 1980). Ties, and with them the order
    within a round, are broken by `seed`. Depends on i and not on how the run is cut into batches.
    """
    shares = np.asarray(shares, dtype=np.float64)
    classes = np.flatnonzero(shares)
    shares = shares[classes]
    margin = 1 / max(1, 2 * len(shares) - 2)
    order = np.random.default_rng(seed)
    given = np.zeros(len(shares))
    targets = np.empty(count, dtype=np.int64)
    for i in range(count):
        lag = shares * (i + 1) - given
        time_left = np.where(lag > margin - 1e-9, (1 - margin - lag) / shares, np.inf)
        ties = order.permutation(len(shares))
        best = ties[np.argmin(np.round(time_left[ties], 9))]
        targets[i] = classes[best]
        given[best] += 1
    return targets


def plan_moves(own: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Classes (n x A, int64) for pictures that show the classes `own` (n x A), so that as few as possible change.

    shares: K_1 x ... x K_A, the target mix of all combinations of A attributes' classes. The combinations get whole
    numbers of pictures as `assign_targets` would deal them. Which combinations give pictures to which others is the
    transport problem, solved exactly: the price is a picture that changes, and among equals a class that changes. The
    share of pictures that change is then half the sum of the absolute differences between the two mixes, their total
    variation distance: no plan changes fewer. `seed` says which of equal pictures change.
    """
    own, sizes = np.asarray(own, dtype=np.int64), shares.shape
    count, combinations = len(own), np.stack(np.unravel_index(np.arange(shares.size), sizes), axis=1)
    have = np.ravel_multi_index(tuple(own.T), sizes)
    given = np.bincount(have, minlength=shares.size)
    wanted = np.bincount(assign_targets(shares.ravel(), count, seed), minlength=shares.size)
    sources, sinks = np.flatnonzero(given), np.flatnonzero(wanted)
    changed = (combinations[sources][:, None] != combinations[sinks]).sum(axis=2)
    price = (changed > 0) + 1e-3 * changed
    # Every source gives what it has and every sink gets what it wants; the best corner has whole numbers.
    rows, columns = np.eye(len(sources)), np.eye(len(sinks))
    sums = np.concatenate([np.repeat(rows, len(sinks), axis=1), np.tile(columns, len(sources))])
    solved = linprog(price.ravel(), A_eq=sums, b_eq=np.concatenate([given[sources], wanted[sinks]]))
    asked = np.empty_like(own)
    for source, flow in zip(sources, solved.x.reshape(price.shape).round(), strict=True):
        asked[have == source] = combinations[sinks[assign_targets(flow / flow.sum(), given[source], seed)]]
    return asked


def joint_shares(marginals: Sequence[np.ndarray]) -> np.ndarray:
    """Mix of all combinations in which attributes with such mixes have nothing to do with each other."""
    joint = np.ones(())
    for shares in marginals:
        joint = np.multiply.outer(joint, shares)
    return joint


LEFT_ALONE = -1  # instead of a class: this picture is not steered at all


@dataclass(frozen=True)
class Targets:
    """The classes that the pictures of a run are asked to show: `shares` (K) of `classes`, dealt out by `seed`.

    Picture i of the run is number first_image + i of the deal, so that a run can go on where another ended.
    asked: the classes of all pictures (n), if they were planned one by one (`plan_moves`) instead of dealt; moved: n,
    bool, which of them need steering at all.
    """

    attribute: str
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    seed: int = 0
    first_image: int = 0
    asked: np.ndarray | None = field(default=None, compare=False)
    moved: np.ndarray | None = field(default=None, compare=False)
    _dealt: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def first(self, count: int) -> np.ndarray:
        """Class (int64) of the first `count` pictures of the run."""
        needed = self.first_image + count
        if self.asked is not None:
            if needed > len(self.asked):
                raise DiffLensError(
                    f"the plan for {self.attribute} holds {len(self.asked)} pictures, the run has {needed}. Plan as "
                    "many pictures as you draw."
                )
            return self.asked[self.first_image : needed]
        if needed not in self._dealt:
            self._dealt[needed] = assign_targets(np.asarray(self.shares), needed, self.seed)
        return self._dealt[needed][self.first_image :]

    def of(self, images: Tensor) -> Tensor:
        """Class (B, int64) to steer pictures `images` to (B, their indices in the run, on the CPU), or LEFT_ALONE."""
        count = int(images.max()) + 1
        classes = self.first(count)
        if self.moved is not None:
            classes = np.where(self.moved[self.first_image :][:count], classes, LEFT_ALONE)
        return torch.from_numpy(classes)[images]


def planned_targets(
    own: Mapping[str, np.ndarray], classes: Mapping[str, tuple[str, ...]], shares: Mapping[str, np.ndarray], seed: int
) -> tuple[Targets, ...]:
    """Targets of every attribute under which the fewest pictures change: see `plan_moves`.

    own: of every attribute the class (n) that each picture shows unsteered; classes: its classes; shares: its target
    mix (K). The attributes are asked to be independent of one another. Pictures that already show all that is asked
    of them are left alone; of the others every attribute is steered, so that those that fit are held where they are.
    """
    labels = np.stack([own[name] for name in shares], axis=1)
    asked = plan_moves(labels, joint_shares([*shares.values()]), seed)
    moved = (asked != labels).any(axis=1)
    return tuple(
        Targets(name, classes[name], tuple(mix.tolist()), seed, asked=asked[:, i].copy(), moved=moved)
        for i, (name, mix) in enumerate(shares.items())
    )


def targets_of(targets: Sequence[Targets], attribute: str, classes: tuple[str, ...]) -> Targets:
    """Those of an attribute. Raises `DiffLensError` if there are none."""
    for own in targets:
        if (own.attribute, own.classes) == (attribute, classes):
            return own
    found = "; ".join(f"{own.attribute} ({', '.join(own.classes)})" for own in targets)
    raise DiffLensError(
        f"the targets are of {found}, but those of {attribute} ({', '.join(classes)}) are needed. Connect the Steer "
        "or the Plan Targets of this attribute."
    )


def plan_in_words(targets: Sequence[Targets], own: Mapping[str, np.ndarray]) -> str:
    """How many pictures a plan changes, and the mix of every attribute; own: as in `planned_targets`."""
    moved = targets[0].moved
    lines = [f"{moved.sum()} of {len(moved)} pictures change ({moved.mean():.1%}); no plan changes fewer."]
    for part in targets:
        lines.append(f"{part.attribute}: {np.mean(part.asked != own[part.attribute]):.1%} change")
        for c, name in enumerate(part.classes):
            lines.append(f"  {name:14}{(own[part.attribute] == c).sum():6} -> {(part.asked == c).sum()}")
    return "\n".join(lines)
