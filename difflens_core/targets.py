"""Which class each picture of a run is asked to show."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from random import Random

import numpy as np
import torch
from torch import Tensor

from .deal import deal_round
from .files import DiffLensError

EVEN = ("", "uniform", "equal", "even", "even mix", "balanced", "fair")


def parse_target(text: str, classes: tuple[str, ...]) -> np.ndarray:
    """Class shares (K, sum 1) from what a user types.

    "uniform" or another word for it; the name of one class; shares in the order of `classes` ("0.7, 0.3", "70/30" or
    "7:3"); or named shares ("young: 1, senior: 3" or "young 25 %, senior 75 %", the others 0).
    """
    text = text.strip().lower()
    names = [name.lower() for name in classes]
    if text in EVEN:
        return np.full(len(classes), 1 / len(classes))
    if text in names:
        return np.eye(len(classes))[names.index(text)]
    parts = [part.strip() for part in re.split(r"[,;\n]+", text) if part.strip()]
    named = [re.fullmatch(r"(.+?)(?:\s*[:=]\s*|\s+)([\d.]+)\s*%?", part) for part in parts]
    try:
        if all(match and match[1] in names for match in named):
            shares = {match[1]: float(match[2]) for match in named if match}
            numbers = [shares.get(name, 0.0) for name in names]
        else:
            numbers = [float(part) for part in re.split(r"[,;:/%\s]+", text.removesuffix("%").rstrip())]
        if len(numbers) != len(classes) or min(numbers) < 0 or not np.isfinite(sum(numbers)) or sum(numbers) <= 0:
            raise ValueError
    except ValueError:
        near = get_close_matches(text, names, 1, 0.5)
        raise DiffLensError(
            f'target "{text}" is not understood. Write "uniform", one of the classes ({", ".join(classes)}), '
            f'{len(classes)} shares in their order such as "{", ".join(["1"] * len(classes))}", or named shares such '
            f'as "{classes[0]}: 1, {classes[-1]}: 3".' + (f" Did you mean {near[0]}?" if near else "")
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
    """Class (int64) of `count` pictures that are all there are, dealt by quota: every prefix is as close as it can be.

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


@lru_cache(maxsize=128)
def deal_for_ever(
    attribute: str, classes: tuple[str, ...], shares: tuple[float, ...], seed: int, beside: tuple | None
) -> tuple[tuple[np.ndarray, ...], int]:
    """The rounds (N, int64) of the deals of a run, this one last, and the place in them of picture 0.

    beside: these arguments of the deal before this one. The first deal chooses the place. The later ones, whose rounds
    were laid out beside the first one's, begin there too: only together do they have nothing to do with each other.
    """
    digest = hashlib.sha256(repr((attribute, classes, shares, seed)).encode()).digest()
    rounds, start = deal_for_ever(*beside) if beside else ((), int.from_bytes(digest[:5], "big"))
    return (*rounds, deal_round(shares, Random(int.from_bytes(digest, "big")), rounds)), start


@dataclass
class Log:
    """What sampling told of a deal: the pictures' numbers, run by run, and what did not come about in the last run.

    first: number in the deal of the first picture of the batch that is being drawn; prompts: how many prompts the
    pictures have in turn; warned: what was said before; of_sites: what the last run told of each of the sites that are
    steered.
    """

    first: int = 0
    prompts: int = 1
    warned: tuple[str, ...] = ()
    numbers: list[np.ndarray] = field(default_factory=list)
    of_sites: dict[str, list[str]] = field(default_factory=dict)

    def tell(self, site: str, numbers: np.ndarray, said: Sequence[str]) -> None:
        """Take down a run at one of the sites: the pictures' numbers, which are the same at all of them."""
        if site == next(iter(self.of_sites), site):
            self.numbers.append(numbers)
        self.of_sites[site] = [*said]

    @property
    def said(self) -> list[str]:
        """What the last run told, each sentence once."""
        return [*dict.fromkeys(sentence for said in self.of_sites.values() for sentence in said)]

    def last(self, count: int) -> np.ndarray | None:
        """Numbers (n, int64) of the last `count` pictures, or None if no last runs have drawn just so many."""
        drawn: list[np.ndarray] = []
        for numbers in reversed(self.numbers):
            drawn.insert(0, numbers)
            if sum(map(len, drawn)) >= count:
                break
        return np.concatenate(drawn) if drawn and sum(map(len, drawn)) == count else None


@dataclass(frozen=True)
class Targets:
    """The classes that the pictures of a run are asked to show: `shares` (K) of `classes`, dealt out by `seed`.

    Picture i of the run is number first_image + i of the deal, so that a run can go on where another ended.
    beside: the targets of another attribute that the run already has, with those beside them. This deal is then
    independent of theirs, which stay as they are. Give both the same first_image. Pictures that have several prompts in
    turn are dealt out so that the pictures of each prompt are as close to the shares as those of all.
    log: what sampling told. asked: the classes of all pictures (n), if they were planned one by one (`plan_moves`)
    instead of dealt; moved: n, bool, which of them need steering at all.
    """

    attribute: str
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    seed: int = 0
    first_image: int = 0
    beside: Targets | None = None
    asked: np.ndarray | None = field(default=None, compare=False)
    moved: np.ndarray | None = field(default=None, compare=False)
    log: Log = field(default_factory=Log, compare=False, repr=False)

    @property
    def deal(self) -> tuple:
        """What decides the deal: arguments of `deal_for_ever`. A plan is none."""
        beside = self.beside.deal if self.beside and self.beside.asked is None else None
        return self.attribute, self.classes, tuple(map(float, self.shares)), int(self.seed), beside

    def first(self, count: int) -> np.ndarray:
        """Class (int64) of the first `count` pictures of the run."""
        return self.at(np.arange(count))

    def shown_last(self, count: int) -> np.ndarray:
        """Class (int64) that each of the last `count` pictures was asked to show, as far as sampling told which."""
        numbers = self.log.last(count)
        return self.first(count) if numbers is None else self.at(numbers)

    def at(self, images: np.ndarray) -> np.ndarray:
        """Class (B, int64) of pictures `images` (B) of the run."""
        numbers = images.astype(np.int64) + self.first_image
        if self.asked is None:
            rounds, start = deal_for_ever(*self.deal)
            # Each prompt begins a step later: its own pictures go on in a row, and so, nearly, do all of them.
            numbers = numbers // self.log.prompts + numbers % self.log.prompts
            return rounds[-1][(numbers + start) % len(rounds[-1])]
        if len(numbers) and (needed := int(numbers.max()) + 1) > len(self.asked):
            raise DiffLensError(
                f"the plan for {self.attribute} holds {len(self.asked)} pictures, the run has {needed}. Plan as "
                "many pictures as you draw."
            )
        return self.asked[numbers]

    def of(self, images: Tensor) -> Tensor:
        """Class (B, int64) to steer pictures `images` to (B, their indices in the batch, on the CPU), or LEFT_ALONE."""
        numbers = images.numpy() + self.log.first
        classes = self.at(numbers)
        if self.moved is not None:
            classes = np.where(self.moved[numbers + self.first_image], classes, LEFT_ALONE)
        return torch.from_numpy(classes)


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
