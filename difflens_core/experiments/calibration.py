"""Strengths and shares with which a recipe meets a target mix: found by drawing pictures, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from torch import Tensor

from ..activations import Draw
from ..files import DiffLensError
from ..measure import fairness_discrepancy, measure_fairness, paired_test, solve_shares
from ..steer import Recipe, plan_moves
from ..targets import LEFT_ALONE, assign_targets
from .draw import Trials

ROUNDS = 4  # strengths tried for every class
WEAKEST, STRONGEST = 0.2, 3.0  # times the recipe's own strength
AT_MOST_ONE = ("move", "clamp", "ablate")  # modes in which a strength above 1 counts as 1
FAILED = 0.97  # mean probability below which a class asked for is said to fail
PARTS = 5  # of the budget: unsteered, dose-response, two for the search, fresh noises


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration may cost and what it must reach.

    budget: pictures to draw at most; tolerance: FD at which the mix is good enough; clear: mean probability that the
    classifier must give the class asked for, in pictures that showed another, unless most pictures that show it
    by themselves get less (`clear_enough`); only_where_needed: pictures that fit
    the target mix as they are stay as they are (`plan_moves`); seed: of the deal.
    """

    budget: int = 1280
    tolerance: float = 0.02
    clear: float = 0.999
    only_where_needed: bool = False
    seed: int = 0

    @property
    def pictures(self) -> int:
        """Noises on which the mix is measured."""
        return self.budget // PARTS


Doses = dict[str, list[tuple[float, float]]]  # of every class: strength, mean probability of the class asked for


def calibrate(
    recipe: Recipe,
    draw: Draw,
    classify: Callable[[Tensor], Tensor],
    target: np.ndarray,
    options: CalibrationOptions | None = None,
    batch: int = 32,
    folder: Path | None = None,
    on_batch: Callable[[int, Doses], None] = lambda done, doses: None,
) -> Recipe:
    """The recipe with strengths, and shares to ask for, under which the pictures' mix meets `target` (K, sum 1).

    1. Unsteered pictures tell the mix to begin with.
    2. Dose-response: the same few pictures of other classes are steered to each class with several strengths. The
       mean probability of the class can only grow with the strength: a monotone fit (isotonic regression) smooths
       it, and the weakest strength that is `clear` enough is taken.
    3. Search: the mix is drawn. If it misses, the shares asked for are solved for anew from what each class asked for
       turned out to show, and classes that are not clear enough get more strength.
    4. The result is drawn once more from noises that nothing was tuned on.

    All on common random numbers: noises 0 to n - 1 of `draw` for 1 to 3, n to 2n - 1 for 4 (n = options.pictures).
    The record of it all is info["calibration"] of the recipe that comes back. It says whether the target was reached
    and if not, why. on_batch(pictures drawn, doses) may raise to cancel.
    """
    options = options or CalibrationOptions()
    check(recipe, target, options)
    doses: Doses = {name: [] for name in recipe.classes}
    trials = Trials(recipe, draw, classify, batch, lambda done: on_batch(done, doses), folder)
    tuning = np.arange(options.pictures)
    unsteered = trials.read(tuning, np.full_like(tuning, LEFT_ALONE), np.zeros(len(target)))
    enough = clear_enough(unsteered, options.clear)
    strength = find_strengths(trials, unsteered, target, enough, doses)
    rounds = search(trials, unsteered, target, options, enough, strength)
    good = [tried for tried in rounds if tried["fd"] <= options.tolerance / 2]
    best = good[-1] if good else min(rounds, key=lambda tried: tried["fd"])
    strength, ask = np.array(best["strength"]), np.array(best["ask"])
    fresh, moved = fresh_report(trials, target, options, strength, ask)
    start = measure_fairness(unsteered, target, recipe.attribute, recipe.classes)
    record = {
        "target": target.tolist(), "ask": ask.tolist(), "only_where_needed": options.only_where_needed,
        "reached": fresh["within"], "why": reason(best, fresh, options),
        "start": {"shares": start.shares, "fd": start.fd}, "doses": doses, "rounds": rounds, "fresh": fresh | moved,
        "pictures": options.pictures, "drawn": len(trials.known), "tolerance": options.tolerance,
        "clear": enough.tolist(),
    }  # fmt: skip
    return replace(recipe, strength=tuple(strength.tolist()), info={**recipe.info, "calibration": record})


def check(recipe: Recipe, target: np.ndarray, options: CalibrationOptions) -> None:
    """Raise `DiffLensError` unless there is enough to measure with."""
    classes = int(np.count_nonzero(target))
    if classes < 2:
        raise DiffLensError(
            f"calibration of {recipe.attribute}: the target asks for one class only, so there is no mix to meet. Use "
            "Steer with that class as target, or give shares for two classes or more."
        )
    if options.pictures < 8 * classes:
        raise DiffLensError(
            f"calibration of {recipe.attribute}: a budget of {options.budget} pictures is too small for {classes} "
            f"classes. Allow at least {8 * classes * PARTS}."
        )


def find_strengths(
    trials: Trials, unsteered: np.ndarray, target: np.ndarray, enough: np.ndarray, doses: Doses
) -> np.ndarray:
    """The weakest strength (K) at which each class of the target is clear `enough` (K); fills `doses`."""
    own = unsteered.argmax(axis=1)
    recipe, (usual, strongest) = trials.recipe, strength_limits(trials.recipe)
    wanted = [c for c in np.flatnonzero(target) if (own != c).sum() >= 2]  # of two classes or more, one at least
    each = max(4, len(own) // (ROUNDS * len(wanted)))
    pictures = {c: np.flatnonzero(own != c)[:each] for c in wanted}
    strength, low, high = np.minimum(usual, strongest), usual * WEAKEST, strongest.copy()
    for c in wanted:
        doses[recipe.classes[c]].append((0.0, float(unsteered[pictures[c], c].mean())))
    for _ in range(ROUNDS):
        asked = np.repeat(wanted, [len(pictures[c]) for c in wanted])
        read = trials.read(np.concatenate([pictures[c] for c in wanted]), asked, strength)
        for c in wanted:
            seen = float(read[asked == c, c].mean())
            doses[recipe.classes[c]].append((float(strength[c]), seen))
            low[c], high[c] = (low[c], strength[c]) if seen >= enough[c] else (strength[c], high[c])
            strength[c] = round(float(np.sqrt(low[c] * high[c])), 3)
    for c in wanted:
        strength[c] = weakest_clear(doses[recipe.classes[c]], enough[c])
    return strength


def clear_enough(unsteered: np.ndarray, clear: float) -> np.ndarray:
    """Mean probability (K) at which each class is clear: `clear`, or less if half of the pictures that show it by
    themselves get less.
    """
    own = unsteered.argmax(axis=1)
    usual = [np.median(unsteered[own == c, c]) if (own == c).sum() >= 4 else 1.0 for c in range(unsteered.shape[1])]
    return np.minimum(usual, clear)


def strength_limits(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """The recipe's own strengths (K), where it has none 1, and the strongest to try."""
    usual = np.array([s or 1.0 for s in recipe.strength])
    return usual, np.minimum(usual * STRONGEST, 1.0) if recipe.mode in AT_MOST_ONE else usual * STRONGEST


def weakest_clear(doses: list[tuple[float, float]], clear: float) -> float:
    """The weakest strength tried whose probability by the monotone fit is `clear`, or else as high as it gets."""
    strengths, seen = np.array(sorted(doses)).T
    fitted = isotonic_regression(seen).x
    return float(strengths[np.argmax(fitted >= (clear if fitted[-1] >= clear else fitted[-1] - 0.005))])


def search(
    trials: Trials, unsteered: np.ndarray, target: np.ndarray, options: CalibrationOptions, enough: np.ndarray,
    strength: np.ndarray,
) -> list[dict[str, Any]]:  # fmt: skip
    """Draw the mix on the tuning noises, mend strengths and shares, and again. What each round tried and saw."""
    ask, rounds, own = target, [], unsteered.argmax(axis=1)
    names, strongest = trials.recipe.classes, strength_limits(trials.recipe)[1]
    while True:
        asked, moved = deal(own, ask, options)
        read = trials.read(np.arange(len(own)), np.where(moved, asked, LEFT_ALONE), strength)
        clear = np.array(
            [read[chosen, c].mean() if (chosen := moved & (asked == c)).any() else 1 for c in range(len(ask))]
        )
        fd = fairness_discrepancy(read, target)
        told = {name: float(p) for name, p in zip(names, clear, strict=True)}
        rounds.append({"strength": strength.tolist(), "ask": ask.tolist(), "fd": fd, "clear": told})
        # What is left must pay for another round and for the fresh noises, where the unsteered ones count too.
        cost = (2 if options.only_where_needed else 1) * int(moved.sum()) + len(own)
        failing = (clear < np.minimum(enough, FAILED)) & (strength < strongest)
        if (fd <= options.tolerance / 2 and not failing.any()) or options.budget - len(trials.known) < cost:
            return rounds
        stronger = np.where(clear < enough, np.minimum(strength * 1.25, strongest), strength)
        # Which shares to ask for: as if a class asked for were the truth, and what is shown a reading with errors.
        answers = [
            read[asked == c].mean(axis=0) if (asked == c).any() else np.eye(len(ask))[c] for c in range(len(ask))
        ]
        again = solve_shares(target, np.stack(answers))
        if np.allclose(again, ask, atol=1e-3) and np.allclose(stronger, strength):
            return rounds
        strength, ask = stronger, again


def deal(own: np.ndarray, ask: np.ndarray, options: CalibrationOptions) -> tuple[np.ndarray, np.ndarray]:
    """The class asked of each picture (n), and whether it is steered at all; own: n, what it shows unsteered."""
    if options.only_where_needed:
        asked = plan_moves(own[:, None], ask, options.seed)[:, 0]
        return asked, asked != own
    return assign_targets(ask, len(own), options.seed), np.ones(len(own), dtype=bool)


def fresh_report(
    trials: Trials, target: np.ndarray, options: CalibrationOptions, strength: np.ndarray, ask: np.ndarray
) -> tuple[dict[str, Any], dict[str, float]]:
    """Fairness on noises that nothing was tuned on; and, where only some pictures change, how many."""
    recipe, noises = trials.recipe, np.arange(options.pictures, 2 * options.pictures)
    own, changes = np.zeros(len(noises), dtype=np.int64), {}
    if options.only_where_needed:
        own = trials.read(noises, np.full_like(noises, LEFT_ALONE), strength).argmax(axis=1)
    asked, moved = deal(own, ask, options)
    read = trials.read(noises, np.where(moved, asked, LEFT_ALONE), strength)
    labels = read.argmax(axis=1)
    if options.only_where_needed:
        pairs = paired_test(own, labels, target)
        changes = {"changed": pairs.changed, "needed": pairs.needed}
    report = measure_fairness(read, target, recipe.attribute, recipe.classes, asked)
    within = all(low <= share <= high for (low, high), share in zip(report.shares_ci, target, strict=True))
    by_class = {
        name: float((labels[asked == c] == c).mean()) for c, name in enumerate(recipe.classes) if (asked == c).any()
    }
    found = {
        "shares": report.shares, "intervals": report.shares_ci, "within": within, "fd": report.fd,
        "fd_ci": report.fd_ci, "fd_hard": report.fd_hard, "success": report.success, "success_by_class": by_class,
    }  # fmt: skip
    return found, changes


def reason(best: dict[str, Any], fresh: dict[str, Any], options: CalibrationOptions) -> str:
    """In a sentence, how it ended, and if the target was not reached, why."""
    if fresh["within"]:
        return f"reached: on fresh noises FD {fresh['fd']:.3f}, and every class's 95 % interval holds its share."
    weak = {name: p for name, p in best["clear"].items() if p < FAILED}
    if weak:
        parts = ", ".join(f"{name} {p:.0%}" for name, p in weak.items())
        return (
            f"not reached: pictures asked for a class show it too seldom ({parts} at up to {STRONGEST:g} times the "
            f"recipe's strength). Use more features, another mode or an earlier start; see Diagnose."
        )
    if best["fd"] > options.tolerance:
        return f"not reached: the budget of {options.budget} pictures is spent at FD {best['fd']:.3f}. Allow more."
    return (
        f"not reached: FD {best['fd']:.3f} on the noises tuned on, {fresh['fd']:.3f} on fresh ones. Allow a larger "
        "budget."
    )


def asked_shares(recipe: Recipe, target: np.ndarray, only_where_needed: bool = False) -> np.ndarray:
    """Shares (K) to ask for so that the pictures' mix is `target`: those of the recipe's calibration for it, if any."""
    record = recipe.info.get("calibration")
    if record and record["only_where_needed"] == only_where_needed and np.allclose(record["target"], target, atol=1e-6):
        return np.array(record["ask"])
    return target
