"""Plans under which the fewest pictures change: which to steer, and into what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linprog

from ..classifiers import NO_CLASS, faces_missing
from ..files import DiffLensError
from ..targets import LEFT_ALONE, Targets, assign_targets, joint_shares


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


def planned_targets(
    own: Mapping[str, np.ndarray], classes: Mapping[str, tuple[str, ...]], shares: Mapping[str, np.ndarray], seed: int
) -> tuple[Targets, ...]:
    """Targets of every attribute under which the fewest pictures change: see `plan_moves`.

    own: of every attribute the class (n) that each picture shows unsteered; classes: its classes; shares: its target
    mix (K). The attributes are asked to be independent of one another. Pictures that already show all that is asked
    of them are left alone; of the others every attribute is steered, so that those that fit are held where they are.
    Pictures of NO_CLASS in any attribute do not count: they are asked for nothing, and the others alone are planned.
    """
    labels = np.stack([own[name] for name in shares], axis=1)
    known, asked = (labels != NO_CLASS).all(axis=1), np.full_like(labels, LEFT_ALONE)
    if not known.any():
        raise DiffLensError(
            f"no face was found in any of the {len(labels)} pictures, so nothing can be planned. Look at them, or set "
            "face_detector to none in Load Attribute Classifier."
        )
    asked[known] = plan_moves(labels[known], joint_shares([*shares.values()]), seed)
    moved = known & (asked != labels).any(axis=1)
    return tuple(
        Targets(name, classes[name], tuple(mix.tolist()), seed, asked=asked[:, i].copy(), moved=moved)
        for i, (name, mix) in enumerate(shares.items())
    )


def plan_in_words(targets: Sequence[Targets], own: Mapping[str, np.ndarray]) -> str:
    """How many pictures a plan changes, and the mix of every attribute; own: as in `planned_targets`.

    Shares are of the pictures that count.
    """
    moved = targets[0].moved
    assert moved is not None  # these are planned, not dealt
    asked = {part.attribute: part.first(len(moved)) for part in targets}
    known = asked[targets[0].attribute] != LEFT_ALONE
    count = int(known.sum())
    lines = [f"{moved.sum()} of {count} pictures change ({moved.sum() / count:.1%}); no plan changes fewer."]
    if count < len(known):
        lines.append(faces_missing(torch.from_numpy(asked[targets[0].attribute])))
    for part in targets:
        before, after = own[part.attribute][known], asked[part.attribute][known]
        lines.append(f"{part.attribute}: {np.mean(after != before):.1%} change")
        for c, name in enumerate(part.classes):
            lines.append(f"  {name:14}{(before == c).sum():6} -> {(after == c).sum()}")
    return "\n".join(lines)
