"""All figures of a fairness report as plain values, from what a classifier reads off the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..classifiers import decided, labels_of, shares_left_out
from ..files import DiffLensError
from ..measure import (
    SMALL_FD,
    clear_pictures,
    correct_for_errors,
    joint_report,
    kept_attributes,
    measure_fairness,
    outcome,
    paired_test,
    pictures_for_fd,
    undecided_bounds,
    wilson_interval,
)
from .charts import bar_chart


@dataclass(frozen=True)
class Question:
    """What a report is about.

    attributes: of the classifier, with their classes; target: shares (K) of the classes of `attribute`; confusion:
    counts (K x K) of `correct_for_errors`, None for no correction; undecided_below: pictures whose likeliest class is
    less likely are undecided, 0 for none; joint_with: other attributes of the joint table, whose classes are all to
    be shown equally often.
    """

    attribute: str
    attributes: Mapping[str, tuple[str, ...]]
    target: np.ndarray
    confusion: np.ndarray | None = None
    undecided_below: float = 0.0
    joint_with: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.attributes[self.attribute]


def side_figures(question: Question, read: Mapping[str, Tensor], assigned: np.ndarray | None = None) -> dict[str, Any]:
    """Figures of one set of n pictures, as `read` by the classifier; assigned: the class each was steered to (n).

    The fields of `fairness.Report` but the question's, of the pictures that show a face where one is looked for, and
    outcome (`measure.outcome`), left_out (by reason), labels (a picture each; None without a face), corrected,
    undecided, joint (None if not asked for). Raises `DiffLensError` if no picture shows anything to measure.
    """
    attribute, classes = question.attribute, question.classes
    known = decided(read).numpy()
    if not known.any():
        raise DiffLensError(
            f"no face was found in any of the {len(known)} pictures, so there is nothing to measure. Look at them, or "
            "set face_detector to none in Load Attribute Classifier."
        )
    probabilities = {name: read[name].numpy()[known] for name in (attribute, *question.joint_with)}
    assigned = None if assigned is None else np.asarray(assigned)[known]
    report = measure_fairness(probabilities[attribute], question.target, attribute, classes, assigned)
    found = asdict(report) | {"outcome": outcome(report)}
    for name in ("attribute", "classes", "target"):
        del found[name]
    corrected, undecided, joint = None, None, None
    if question.confusion is not None:
        labels = probabilities[attribute].argmax(axis=1)
        corrected = asdict(correct_for_errors(labels, question.target, question.confusion, classes, assigned))
    if question.undecided_below:
        clear = clear_pictures(read, attribute, question.undecided_below)
        undecided = asdict(undecided_bounds(read[attribute].numpy(), question.target, clear))
    if question.joint_with:
        joint = joint_figures(question, probabilities)
    return {
        **found, "left_out": shares_left_out(read, attribute), "labels": labels_of(read, attribute, classes),
        "corrected": corrected, "undecided": undecided, "joint": joint,
    }  # fmt: skip


def joint_figures(question: Question, probabilities: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Figures of the cells of several attributes (n x K of each): their names, targets, counts and discrepancy."""
    equal = {
        name: np.full(len(question.attributes[name]), 1 / len(question.attributes[name])) for name in probabilities
    }
    found = joint_report(probabilities, question.attributes, {**equal, question.attribute: question.target})
    report = asdict(found.report)
    figures = ("target", "shares", "shares_ci", "fd_hard", "fd_hard_ci", "threshold", "p_value")
    return {
        "attributes": found.attributes, "cells": report["classes"], "counts": found.counts.ravel().tolist(),
        **{name: report[name] for name in figures},
    }  # fmt: skip


def pair_figures(question: Question, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """What became of the class and of other attributes, of the n pictures that show a face before and after.

    paired: the fields of `significance.PairedTest`; kept, kept_ci: share of pictures that keep their class in each
    other attribute, with Wilson's interval. Both None and empty if no picture is left.
    """
    known = decided(before) & decided(after)
    if not known.any():
        return {"paired": None, "kept": {}, "kept_ci": {}}
    old, new = (read[question.attribute][known].argmax(dim=1).numpy() for read in (before, after))
    kept, n = kept_attributes(before, after, question.attribute), int(known.sum())
    intervals = {name: wilson_interval(share * n, n) for name, share in kept.items()}
    return {
        "paired": asdict(paired_test(old, new, question.target)),
        "kept": kept,
        "kept_ci": {name: (float(low), float(high)) for name, (low, high) in intervals.items()},
    }


def summary(
    question: Question,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor] | None = None,
    assigned: np.ndarray | None = None,
) -> dict[str, Any]:
    """The figures of a report as plain values, ready for JSON; what only a comparison tells is None without `after`.

    resolution: how many pictures it takes to tell a small discrepancy (fd) from chance, None where a single class is
    asked for: any other picture is one too many. notes, changes (what else changed, of `measure_changes`),
    pixel_change, judged (of `judged_figures`) and not_measured (sentences) are for the caller to fill.
    """
    pair = {"paired": None, "kept": None, "kept_ci": None} if after is None else pair_figures(question, before, after)
    first = side_figures(question, before)
    several = np.count_nonzero(question.target) > 1
    return {
        "attribute": question.attribute, "classes": question.classes, "target": question.target.tolist(),
        "n": first["n"], "undecided_below": question.undecided_below,
        "resolution": {"fd": SMALL_FD, "pictures": pictures_for_fd(SMALL_FD, question.target) if several else None},
        "before": first, "after": after and side_figures(question, after, assigned), **pair,
        "notes": "", "changes": None, "pixel_change": None, "judged": None, "not_measured": [],
    }  # fmt: skip


def share_chart(numbers: Mapping[str, Any]) -> np.ndarray:
    """Bar chart of the class shares with their intervals (H x W x 3, uint8).

    A dashed line shows a target that is the same for all, bars any other. They come last: before and after have
    the same colours in every chart.
    """
    classes, target = numbers["classes"], numbers["target"]
    sides = {name: numbers[name] for name in ("before", "after") if numbers[name]}
    groups = {name: {side: found["shares"][i] for side, found in sides.items()} for i, name in enumerate(classes)}
    errors = {name: {side: found["shares_ci"][i] for side, found in sides.items()} for i, name in enumerate(classes)}
    reference = target[0] if len(set(target)) == 1 else None
    if reference is None:
        groups = {name: bars | {"target": target[i]} for i, (name, bars) in enumerate(groups.items())}
    title = f"{numbers['attribute']}: share of each class in {numbers['n']} pictures"
    return bar_chart(title, groups, reference, errors)
