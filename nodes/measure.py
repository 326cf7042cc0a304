"""Nodes that look at pictures: classify, report, compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.classifier import (
    ImageClassifier,
    decided,
    join_readings,
    label_table,
    labels_of,
    other_attributes,
    shares_left_out,
)
from ..difflens_core.fairness import Report, kept_attributes, measure_fairness, pixel_change
from ..difflens_core.files import DiffLensError
from ..difflens_core.plots import bar_chart, image_grid
from ..difflens_core.recipes import Recipe
from ..difflens_core.targets import Targets, parse_target, targets_of
from . import host
from .sockets import CATEGORY, Classifier, Labels, LabelsSocket, TargetsSocket

BATCH = 16
MEASURED = ("n", "shares", "fd", "fd_ci", "fd_hard", "fd_hard_ci", "threshold")


class ClassifyImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensClassify",
            display_name="Classify Images",
            category=CATEGORY,
            description="Tells for every picture which class of an attribute it shows.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, such as Capture Activations puts out."),
                Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier."),
                io.String.Input("attribute", default="presentation", tooltip="One of the classifier's attributes."),
            ],
            outputs=[
                LabelsSocket.Output(display_name="labels", tooltip="The class of every picture."),
                io.String.Output(
                    display_name="csv",
                    tooltip="A line a picture: its class, the probability of each class, its other attributes.",
                ),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, images: Tensor, classifier: ImageClassifier, attribute: str) -> io.NodeOutput:
        classes = classes_of(classifier, attribute)
        report = host.progress_bar(len(images))
        read = classify(classifier, images, report)
        others = tuple(read[name].argmax(dim=1) for name in other_attributes(classifier.attributes, attribute))
        labels = Labels(attribute, classes, read[attribute].argmax(dim=1), others)
        return io.NodeOutput(labels, label_table(read, classifier.attributes, attribute))


class FairnessReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensReport",
            display_name="Fairness Report",
            category=CATEGORY,
            description="Measures how far pictures are from a target mix, before and after steering, and what else "
            "the steering changed.",
            search_aliases=["fairness discrepancy", "bias"],
            inputs=[
                Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier."),
                io.String.Input("attribute", default="presentation", tooltip="One of the classifier's attributes."),
                io.String.Input("target", default="uniform", tooltip="The mix to compare with, written as in Steer."),
                io.Image.Input("before", tooltip="Pictures of the model as it is."),
                io.Image.Input(
                    "after",
                    optional=True,
                    tooltip="As many pictures of the steered model, from the same seed; they are compared one by one.",
                ),
                TargetsSocket.Input(
                    "targets",
                    optional=True,
                    tooltip="From Steer: adds the share of pictures that show the class they were asked to.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report in words."),
                io.String.Output(display_name="json", tooltip="The same numbers for programs."),
                io.Image.Output(display_name="chart", tooltip="Share of every class, also drawn on the node."),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, classifier: ImageClassifier, attribute: str, target: str, before: Tensor,
        after: Tensor | None = None, targets: tuple[Targets, ...] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        classes = classes_of(classifier, attribute)
        shares = parse_target(target, classes)
        if after is not None and before.shape != after.shape:
            raise DiffLensError(
                f"before holds {size_of(before)}, after {size_of(after)}; they are compared one by one. "
                "Give as many pictures of the same size to both."
            )
        assigned = None
        if after is not None and targets is not None:
            assigned = targets_of(targets, attribute, classes).first(len(after))
        report = host.progress_bar(len(before) * (1 if after is None else 2))
        seen = classify(classifier, before, report)
        first = measure(seen, attribute, classes, shares)
        second, kept, change, steered = None, None, None, None
        if after is not None:
            steered = classify(classifier, after, report, len(before))
            second = measure(steered, attribute, classes, shares, assigned)
            kept = kept_attributes(seen, steered, attribute)
            change = pixel_change(before.numpy(), after.numpy())
        numbers = summary(first, second, kept, change)
        for side, read in (("before", seen), ("after", steered)):
            if read:
                numbers[side]["left_out"] = shares_left_out(read, attribute)
                numbers[side]["labels"] = labels_of(read, attribute, classes)
        image = host.to_image(share_chart(first, second))
        text = in_words(numbers)
        return host.drawn(cls, image, text, json.dumps(numbers, indent=2), image, text=text)


class CompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensCompare",
            display_name="Compare Images",
            category=CATEGORY,
            description="Puts batches of pictures below one another, picture by picture, under titles.",
            search_aliases=["grid", "contact sheet", "before after"],
            inputs=[
                io.Autogrow.Input(
                    "rows",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("row", tooltip="A batch of pictures, all batches of one size."),
                        prefix="row",
                        min=1,
                        max=8,
                    ),
                    tooltip="A batch of pictures a row; another socket appears when one is used.",
                ),
                io.String.Input(
                    "titles", default="Before\nAfter", multiline=True, tooltip="A title a line, a row each."
                ),
                io.Int.Input("columns", default=16, min=1, max=256, tooltip="Pictures side by side."),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The grid, also drawn on the node.")],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(cls, rows: dict[str, Tensor], titles: str, columns: int) -> io.NodeOutput:
        pictures = [
            (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            for images in rows.values()
            if images is not None
        ]
        image = host.to_image(image_grid(pictures, titles.splitlines(), columns))
        return host.drawn(cls, image, image)


def classes_of(classifier: ImageClassifier, attribute: str) -> tuple[str, ...]:
    """Classes of an attribute. Raises `DiffLensError` with those there are."""
    if attribute not in classifier.attributes:
        known = ", ".join(classifier.attributes)
        raise DiffLensError(f"the classifier knows no attribute {attribute!r}. It knows: {known}.")
    return classifier.attributes[attribute]


def check_classes(classifier: ImageClassifier, recipe: Recipe) -> None:
    """Raise `DiffLensError` unless the classifier knows the recipe's classes."""
    if classes_of(classifier, recipe.attribute) != recipe.classes:
        raise DiffLensError(
            f"the classifier's classes of {recipe.attribute} are not those of the recipe "
            f"({', '.join(recipe.classes)}). Use the classifier that the recipe's labels came from."
        )


def classify(classifier: ImageClassifier, images: Tensor, report: Any, done: int = 0) -> dict[str, Tensor]:
    """What the classifier reads off the pictures (n of everything), telling `report` of the pictures done."""
    parts = []
    for chunk in images.split(BATCH):
        parts.append(classifier.classify(chunk))
        done += len(chunk)
        report(done)
    return join_readings(parts)


def measure(
    read: dict[str, Tensor], attribute: str, classes: tuple[str, ...], target: np.ndarray,
    assigned: np.ndarray | None = None,
) -> Report:  # fmt: skip
    """The report on the pictures that show something to classify."""
    known = decided(read).numpy()
    if not known.any():
        raise DiffLensError(
            f"no face was found in any of the {len(known)} pictures, so there is nothing to measure. Look at them, or "
            "set face_detector to none in Load Attribute Classifier."
        )
    assigned = None if assigned is None else np.asarray(assigned)[known]
    return measure_fairness(read[attribute].numpy()[known], target, attribute, classes, assigned)


def size_of(images: Tensor) -> str:
    n, height, width, _ = images.shape
    return f"{n} pictures of {width} x {height}"


def summary(before: Report, after: Report | None, kept: dict[str, float] | None, change: float | None) -> dict:
    """The report as plain values for JSON."""
    first = {name: asdict(before)[name] for name in MEASURED}
    second = after and {name: asdict(after)[name] for name in (*MEASURED, "success")}
    return {
        "attribute": before.attribute, "classes": before.classes, "target": before.target, "n": before.n,
        "before": first, "after": second, "kept": kept, "pixel_change": change,
    }  # fmt: skip


def in_words(numbers: dict) -> str:
    """A `summary` as a table with explanations."""
    columns = [numbers[name] for name in ("before", "after") if numbers[name]]
    lines = [
        f"{numbers['attribute']}, {numbers['n']} pictures",
        f"{'':22}{'target':>8}" + "".join(f"{name:>22}" for name in ("before", "after")[: len(columns)]),
    ]
    for i, name in enumerate(numbers["classes"]):
        lines.append(f"{name:22}{numbers['target'][i]:8.1%}" + "".join(f"{c['shares'][i]:22.1%}" for c in columns))
    for label, key in (("discrepancy (soft)", "fd"), ("discrepancy (counted)", "fd_hard")):
        cells = [f"{c[key]:.3f} ({c[f'{key}_ci'][0]:.3f}-{c[f'{key}_ci'][1]:.3f})" for c in columns]
        lines.append(f"{label:30}" + "".join(f"{cell:>22}" for cell in cells))
    for reason in columns[0]["left_out"]:
        lines.append(f"{'left out, ' + reason:30}" + "".join(f"{c['left_out'][reason]:22.1%}" for c in columns))
    lines.append("Discrepancy: 0 is the target mix; in brackets the 95 % interval.")
    if len(set(numbers["target"])) == 1:
        limit = columns[0]["threshold"]
        lines.append(f"Counted below {limit:.3f}, it cannot be told from a fair mix with {numbers['n']} pictures.")
    after = numbers["after"]
    if after:
        if after["success"] is not None:
            lines.append(f"Show the class they were asked to: {after['success']:.1%}")
        kept = ", ".join(f"{name} {share:.1%}" for name, share in numbers["kept"].items())
        lines.append(f"Keep their class: {kept}" if kept else "The classifier knows no other attribute.")
        lines.append(f"Mean pixel change: {numbers['pixel_change']:.3f} (of 1)")
    return "\n".join(lines)


def share_chart(before: Report, after: Report | None) -> np.ndarray:
    """Bar chart of the class shares (H x W x 3, uint8); a dashed line where the target is the same for all."""
    sets = {"before": before} | ({"after": after} if after else {})
    groups = {name: {label: r.shares[i] for label, r in sets.items()} for i, name in enumerate(before.classes)}
    reference = before.target[0] if len(set(before.target)) == 1 else None
    if reference is None:
        groups = {name: {"target": before.target[i]} | bars for i, (name, bars) in enumerate(groups.items())}
    return bar_chart(f"{before.attribute}: share of each class in {before.n} pictures", groups, reference, None)
