"""Which class each picture of a run is asked to show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
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
