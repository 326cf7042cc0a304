"""Strengths and shares with which a recipe meets a target mix: found by drawing pictures, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from ..activations import Draw
from ..classifiers import NO_CLASS, seen_classes
from ..files import DiffLensError
from ..measure import (
    MISSED,
    REACHED,
    SMALL_FD,
    fairness_discrepancy,
    measure_fairness,
    outcome,
    paired_test,
    pictures_for_fd,
    solve_shares,
)
from ..sae import SparseAutoencoder
from ..steer import Recipe, plan_moves
from ..targets import LEFT_ALONE, assign_targets
from .draw import Trials
from .outcomes import mean_seen

ROUNDS = 4  # strengths tried for every class
WEAKEST, STRONGEST = 0.2, 3.0  # times the recipe's own strength
AT_MOST_ONE = ("move", "clamp", "ablate")  # modes in which a strength above 1 counts as 1
FAILED = 0.97  # mean probability below which a class asked for is said to fail
WEIGHED_BY = 256  # noises at most that tell what the latents do
PARTS = 5  # of the budget: unsteered, dose-response, two for the search, fresh noises


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration may cost and what it must reach.

    budget: pictures to draw at most; tolerance: FD at which the search is content; clear: mean probability that the
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

    @property
    def weighed_by(self) -> int:
        """Noises on which the latents are weighed, where they are (`steer.weigh_latents`)."""
        return min(WEIGHED_BY, self.pictures)

    @property
    def margin(self) -> float:
        """FD that the mix must surely stay below for the target to be reached (`measure.outcome`)."""
        return max(SMALL_FD, self.tolerance)


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
    sae: SparseAutoencoder | None = None,
    on_mix: Callable[[str, np.ndarray], None] = lambda name, shares: None,
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
    classify(images) gives the class probabilities (B x K), as `seen`: pictures without a face do not count anywhere.
    The record of it all is info["calibration"] of the recipe that comes back. It says whether the target was reached
    (`measure.outcome`) and if not, why, and for which settings of the recipe it holds. A strength below 0 stays below.
    sae: as for `Steering`. on_batch(pictures drawn, doses) may raise to cancel. on_mix is told the shares (K) that the
    pictures show, "as it is" and then "steered", round by round.
    """
    options = options or CalibrationOptions()
    check_calibration(recipe, target, options)
    doses: Doses = {name: [] for name in recipe.classes}
    trials = Trials(recipe, draw, classify, batch, lambda done: on_batch(done, doses), folder, sae=sae)
    tuning = np.arange(options.pictures)
    unsteered = trials.read(tuning, np.full_like(tuning, LEFT_ALONE), np.zeros(len(target)))
    tuning = np.flatnonzero(shown(unsteered) != NO_CLASS)
    no_face, unsteered = 1 - len(tuning) / len(unsteered), unsteered[tuning]
    check_faces(recipe, target, options, len(tuning))
    on_mix("as it is", mix_of(unsteered))
    enough = clear_enough(unsteered, options.clear)
    strength = find_strengths(trials, tuning, unsteered, target, enough, doses)
    rounds = search(trials, tuning, unsteered, target, options, enough, strength, on_mix)
    good = [tried for tried in rounds if tried["fd"] <= options.tolerance / 2]
    best = good[-1] if good else min(rounds, key=lambda tried: tried["fd"])
    strength, ask = np.array(best["strength"]), np.array(best["ask"])
    fresh, moved = fresh_report(trials, target, options, strength, ask)
    start = measure_fairness(unsteered, target, recipe.attribute, recipe.classes)
    record = {
        "target": target.tolist(), "ask": ask.tolist(), "only_where_needed": options.only_where_needed,
        "reached": fresh["outcome"] == REACHED, "why": reason(best, fresh, target, options),
        "start": {"shares": start.shares, "fd": start.fd, "no_face": no_face}, "doses": doses, "rounds": rounds,
        "fresh": fresh | moved,
        "pictures": options.pictures, "drawn": len(trials.known), "tolerance": options.tolerance,
        "clear": enough.tolist(), "margin": options.margin, "mode": recipe.mode, "strength": strength.tolist(),
        "range": [recipe.start, recipe.end], "hold": recipe.hold,
    }  # fmt: skip
    return replace(recipe, strength=tuple(strength.tolist()), info={**recipe.info, "calibration": record})


def check_calibration(recipe: Recipe, target: np.ndarray, options: CalibrationOptions) -> None:
    """Raise `DiffLensError` unless there is enough to measure with: before anything is drawn."""
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


def check_faces(recipe: Recipe, target: np.ndarray, options: CalibrationOptions, faces: int) -> None:
    """Raise `DiffLensError` unless enough of the unsteered pictures show a face."""
    needed = 8 * int(np.count_nonzero(target))
    if faces < needed:
        raise DiffLensError(
            f"calibration of {recipe.attribute}: a face was found in {faces} of {options.pictures} unsteered pictures, "
            f"at least {needed} are needed. Look at them, allow a larger budget, or set face_detector to none in Load "
            "Attribute Classifier."
        )


def shown(read: np.ndarray) -> np.ndarray:
    """The likeliest class of every picture (n), or NO_CLASS, from what `Trials` read (n x K)."""
    return seen_classes(torch.from_numpy(read)).numpy()


def mix_of(read: np.ndarray) -> np.ndarray:
    """Shares (K) of the classes that pictures show, all of which count, from what `Trials` read (n x K)."""
    return np.bincount(shown(read), minlength=read.shape[1]) / len(read)


def find_strengths(
    trials: Trials, tuning: np.ndarray, unsteered: np.ndarray, target: np.ndarray, enough: np.ndarray, doses: Doses
) -> np.ndarray:
    """The weakest strength (K) at which each class of the target is clear `enough` (K); fills `doses`.

    tuning: n, the noises; unsteered: n x K, what they show. Strengths keep the sign of the recipe's own.
    """
    own = unsteered.argmax(axis=1)
    recipe, (usual, strongest) = trials.recipe, strength_limits(trials.recipe)
    sign, usual = np.sign(usual), np.abs(usual)
    wanted = [c for c in np.flatnonzero(target) if (own != c).sum() >= 2]  # of two classes or more, one at least
    each = max(4, len(own) // (ROUNDS * len(wanted)))
    pictures = {c: np.flatnonzero(own != c)[:each] for c in wanted}
    size, low, high = np.minimum(usual, strongest), usual * WEAKEST, strongest.copy()
    for c in wanted:
        doses[recipe.classes[c]].append((0.0, float(unsteered[pictures[c], c].mean())))
    for _ in range(ROUNDS):
        asked = np.repeat(wanted, [len(pictures[c]) for c in wanted])
        read = trials.read(tuning[np.concatenate([pictures[c] for c in wanted])], asked, sign * size)
        for c in wanted:
            probability = mean_seen(read[asked == c, c])
            doses[recipe.classes[c]].append((float(sign[c] * size[c]), probability))
            low[c], high[c] = (low[c], size[c]) if probability >= enough[c] else (size[c], high[c])
            size[c] = round(float(np.sqrt(low[c] * high[c])), 3)
    strength = sign * size
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
    """The recipe's own strengths (K), where it has none 1, and the strongest to try, whatever their sign."""
    usual = np.array([s or 1.0 for s in recipe.strength])
    strongest = np.abs(usual) * STRONGEST
    capped = (usual > 0) & (recipe.mode in AT_MOST_ONE)
    return usual, np.where(capped, np.minimum(strongest, 1.0), strongest)


def weakest_clear(doses: list[tuple[float, float]], clear: float) -> float:
    """The weakest strength tried whose probability by the monotone fit is `clear`, or else as high as it gets."""
    strengths, seen = np.array(sorted(doses, key=lambda dose: abs(dose[0]))).T
    fitted = isotonic_regression(seen).x
    return float(strengths[np.argmax(fitted >= (clear if fitted[-1] >= clear else fitted[-1] - 0.005))])


def search(
    trials: Trials, tuning: np.ndarray, unsteered: np.ndarray, target: np.ndarray, options: CalibrationOptions,
    enough: np.ndarray, strength: np.ndarray, on_mix: Callable[[str, np.ndarray], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Draw the mix on the `tuning` noises, mend strengths and shares, and again. What each round tried and saw."""
    ask, rounds, own = target, [], unsteered.argmax(axis=1)
    names, strongest = trials.recipe.classes, strength_limits(trials.recipe)[1]
    while True:
        asked, moved = deal(own, ask, options)
        read = trials.read(tuning, np.where(moved, asked, LEFT_ALONE), strength)
        known = shown(read) != NO_CLASS
        if known.any():
            on_mix("steered", mix_of(read[known]))
        clear = np.array(
            [mean_seen(read[chosen, c]) if (chosen := moved & (asked == c)).any() else 1 for c in range(len(ask))]
        )
        fd = fairness_discrepancy(read[known], target) if known.any() else 2**0.5  # the largest there is
        told = {name: float(p) for name, p in zip(names, clear, strict=True)}
        rounds.append({"strength": strength.tolist(), "ask": ask.tolist(), "fd": fd, "clear": told})
        # What is left must pay for another round and for the fresh noises, where the unsteered ones count too.
        cost = (2 if options.only_where_needed else 1) * int(moved.sum()) + len(own)
        failing = (clear < np.minimum(enough, FAILED)) & (np.abs(strength) < strongest)
        if (fd <= options.tolerance / 2 and not failing.any()) or options.budget - len(trials.known) < cost:
            return rounds
        size = np.minimum(np.abs(strength) * 1.25, strongest)
        stronger = np.where(clear < enough, np.sign(strength) * size, strength)
        # Which shares to ask for: as if a class asked for were the truth, and what is shown a reading with errors.
        answers = [
            read[mine].mean(axis=0) if (mine := known & (asked == c)).any() else np.eye(len(ask))[c]
            for c in range(len(ask))
        ]
        strength, ask = stronger, solve_shares(target, np.stack(answers))
        # Noises are common to all rounds, so that what was tried before would go round in circles.
        if any(np.allclose(ask, r["ask"], atol=1e-3) and np.allclose(strength, r["strength"]) for r in rounds):
            return rounds


def deal(own: np.ndarray, ask: np.ndarray, options: CalibrationOptions) -> tuple[np.ndarray, np.ndarray]:
    """The class asked of each picture (n), and whether it is steered at all; own: n, what it shows unsteered."""
    if options.only_where_needed:
        asked = plan_moves(own[:, None], ask, options.seed)[:, 0]
        return asked, asked != own
    return assign_targets(ask, len(own), options.seed), np.ones(len(own), dtype=bool)


def fresh_report(
    trials: Trials, target: np.ndarray, options: CalibrationOptions, strength: np.ndarray, ask: np.ndarray
) -> tuple[dict[str, Any], dict[str, float]]:
    """Fairness on noises that nothing was tuned on; and, where only some pictures change, how many.

    Pictures without a face do not count. Where it must be known what they show unsteered, those without one then are
    left alone.
    """
    recipe, noises = trials.recipe, np.arange(options.pictures, 2 * options.pictures)
    own, changes = np.zeros(len(noises), dtype=np.int64), {}
    if options.only_where_needed:
        own = shown(trials.read(noises, np.full_like(noises, LEFT_ALONE), strength))
        noises, own = noises[own != NO_CLASS], own[own != NO_CLASS]
    asked, moved = deal(own, ask, options)
    read = trials.read(noises, np.where(moved, asked, LEFT_ALONE), strength)
    known = shown(read) != NO_CLASS
    if not known.any():
        raise DiffLensError(
            f"calibration of {recipe.attribute}: no face was found in any of {len(read)} steered pictures. Use a "
            "recipe that changes them less."
        )
    own, asked, read = own[known], asked[known], read[known]
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
        "fd_ci": report.fd_ci, "fd_hard": report.fd_hard, "fd_hard_ci": report.fd_hard_ci,
        "outcome": outcome(report, options.margin), "counted": len(read), "no_face": 1 - len(read) / options.pictures,
        "success": report.success, "success_by_class": by_class,
    }  # fmt: skip
    return found, changes


def reason(best: dict[str, Any], fresh: dict[str, Any], target: np.ndarray, options: CalibrationOptions) -> str:
    """In a sentence, how it ended, and if the target was not reached, why."""
    highest, counted = fresh["fd_hard_ci"][1], f"{fresh['counted']} fresh noises"
    if fresh["outcome"] == REACHED:
        return (
            f"reached: on {counted} the counted FD is {fresh['fd_hard']:.3f}, with 95 % certainty at most "
            f"{highest:.3f}; up to {options.margin:g} counts as reached."
        )
    if fresh["outcome"] != MISSED:
        needed = pictures_for_fd(options.margin, target)
        return (
            f"not excluded, too few pictures to tell: on {counted} the counted FD is {fresh['fd_hard']:.3f}, but may "
            f"be up to {highest:.3f}, where {options.margin:g} counts as reached. {needed} would tell: a budget of "
            f"{PARTS * needed}."
        )
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
    """Shares (K) to ask for so that the pictures' mix is `target`.

    Those of the recipe's calibration, if it was for this target and for the recipe as it is now.
    """
    record = recipe.info.get("calibration")
    if (
        record
        and record["only_where_needed"] == only_where_needed
        and np.allclose(record["target"], target, atol=1e-6)
        and calibrated_as_is(recipe, record)
    ):
        return np.array(record["ask"])
    return target


def plan_is_stale(recipe: Recipe, used: Recipe | None, shares: tuple[float, ...]) -> bool:
    """Whether a plan's `shares` (K) make up for misses of the recipe as calibrated, and it is not used as such.

    used: the recipe with the settings that it is used with, None if it is used in a way that was not calibrated.
    """
    record = recipe.info.get("calibration")
    if not record or not record["only_where_needed"] or np.allclose(record["ask"], record["target"], atol=1e-6):
        return False
    planned = np.allclose(record["ask"], shares, atol=1e-6) and calibrated_as_is(recipe, record)
    return planned and (used is None or not calibrated_as_is(used, record))


def calibrated_as_is(recipe: Recipe, record: dict[str, Any]) -> bool:
    """Whether the recipe still has the settings that its calibration found.

    Records of older versions name no mode and no range; the strengths are those of a round with these shares.
    """
    if "mode" not in record:
        tried = [own for own in record.get("rounds", ()) if np.allclose(own["ask"], record["ask"])]
        return not tried or any(np.allclose(own["strength"], recipe.strength) for own in tried)
    same = np.allclose(record["strength"], recipe.strength) and np.allclose(record["range"], [recipe.start, recipe.end])
    return same and (record["mode"], record.get("hold", False)) == (recipe.mode, recipe.hold)
