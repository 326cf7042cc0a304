"""Nodes for people to look at: the fairness report, and pictures side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.classifiers import ImageClassifier
from ..difflens_core.files import DiffLensError, write_whole
from ..difflens_core.measure import (
    PERCEPTUAL,
    Judged,
    feature_changes,
    judged_figures,
    measure_changes,
    parse_confusion,
    perceptual_network,
)
from ..difflens_core.report import SHOWN, Question, image_grid, report_page, report_text, share_chart, summary
from ..difflens_core.targets import Targets, parse_target, targets_of
from . import host
from .classify import BATCH, classes_of, classify
from .sockets import CATEGORY, Classifier, JudgementsSocket, TargetsSocket

NETWORK_MEMORY = 4 * 2**30  # bytes that LPIPS or DISTS may take for large pictures
AS_ASKED = "as asked"  # an attribute or a target: what the steered pictures were asked for


class FairnessReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensReport",
            display_name="Fairness Report",
            category=CATEGORY,
            description="Measures how far pictures are from a target mix, before and after steering, and what else "
            "the steering changed.",
            search_aliases=[
                "fairness discrepancy",
                "bias",
                "diversity",
                "representation",
                "measure",
                "LPIPS",
                "SSIM",
                "CLIP-I",
                "FID",
                "KID",
            ],
            inputs=[
                Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier."),
                io.String.Input(
                    "attribute",
                    default="presentation",
                    tooltip=f'One of the classifier\'s attributes, or "{AS_ASKED}": that of the targets.',
                ),
                io.String.Input(
                    "target",
                    default="uniform",
                    tooltip=f'The mix to compare with, written as in Steer, or "{AS_ASKED}": that of the targets.',
                ),
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
                *more_report_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report in words."),
                io.String.Output(display_name="json", tooltip="The same numbers for programs."),
                io.Image.Output(display_name="chart", tooltip="Share of every class, also drawn on the node."),
                io.String.Output(display_name="page", tooltip="Path of the page that was written, or nothing."),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, classifier: ImageClassifier, attribute: str, target: str, before: Tensor,
        after: Tensor | None = None, targets: tuple[Targets, ...] | None = None, joint_with: str = "",
        confusion: str = "", undecided_below: float = 0.0, perceptual: str = "none", notes: str = "", save_as: str = "",
        clip_vision: Any = None, judgements: Judged | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if AS_ASKED in (attribute, target):
            attribute, target = as_asked(attribute, target, targets)
        classes = classes_of(classifier, attribute)
        if after is not None and before.shape != after.shape:
            raise DiffLensError(
                f"before holds {size_of(before)}, after {size_of(after)}; they are compared one by one. "
                "Give as many pictures of the same size to both."
            )
        question = Question(
            attribute, classifier.attributes, parse_target(target, classes),
            parse_confusion(confusion, classes) if confusion.strip() else None, undecided_below,
            joint_attributes(joint_with, classifier, attribute),
        )  # fmt: skip
        assigned, said = None, []
        if after is not None and targets is not None:
            asked = targets_of(targets, attribute, classes)
            assigned = asked.shown_last(len(after))
            said = [
                f"Steer: {sentence}" for sentence in [*asked.log.warned, *asked.log.said, *untold(asked, len(after))]
            ]
        path = host.new_output(save_as, ".html") if save_as.strip() else None
        embed = None if clip_vision is None else host.image_embedder(clip_vision)

        count = len(before)
        report = host.progress_bar(count if after is None else count * (3 if embed is None else 5))
        seen = classify(classifier, before, report)
        steered = None if after is None else classify(classifier, after, report, count)
        numbers = summary(question, seen, steered, assigned)
        numbers |= {"size": (before.shape[2], before.shape[1]), "notes": notes.strip()}
        numbers |= {"judged": judgements and judged_figures(judgements)}
        if after is not None:
            found, reasons = what_changed(before, after, perceptual, embed, lambda done: report(2 * count + done))
            numbers |= {"changes": found, "pixel_change": found["rmse"], "not_measured": said + reasons}

        chart, text = share_chart(numbers), report_text(numbers)
        if path:
            shown = [None if images is None else to_bytes(images[:SHOWN]) for images in (before, after)]
            write_whole(path, report_page(numbers, chart, *shown, day=time.strftime("%Y-%m-%d")).encode())
        image, written, told = host.to_image(chart), str(path or ""), json.dumps(numbers, indent=2)
        return host.drawn(cls, image, text, told, image, written, text=text, json=told)


def as_asked(attribute: str, target: str, targets: tuple[Targets, ...] | None) -> tuple[str, str]:
    """The attribute and the target, as they would be written, with what the targets say where they are to say it."""
    if targets is None:
        raise DiffLensError(
            f'attribute or target is "{AS_ASKED}", but no targets are connected, so it is not known what was asked '
            "for. Connect the targets of Debias or Steer, or write what to measure."
        )
    asked = targets[0]
    if attribute not in (AS_ASKED, asked.attribute):
        raise DiffLensError(
            f'the target is "{AS_ASKED}", but the targets are of {asked.attribute} and the report is on {attribute}. '
            f'Write "{AS_ASKED}" or {asked.attribute} into attribute.'
        )
    return asked.attribute, ", ".join(map(str, asked.shares)) if target == AS_ASKED else target


def more_report_inputs() -> list[io.Input]:
    """What a report can tell beside the shares. They came later, so they are the node's last inputs."""
    return [
        io.String.Input(
            "joint_with",
            default="",
            advanced=True,
            optional=True,
            tooltip="Other attributes of the classifier, divided by commas: adds a table of all combinations.",
        ),
        io.String.Input(
            "confusion",
            default="",
            multiline=True,
            advanced=True,
            optional=True,
            tooltip="The classifier's errors on labelled pictures: a line for each true class, with how many of its "
            "pictures were taken for each class. Adds shares without these errors. Empty: none.",
        ),
        io.Float.Input(
            "undecided_below",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            advanced=True,
            optional=True,
            tooltip="Pictures whose likeliest class is less likely than this are undecided: adds what they could do "
            "to the discrepancy. 0: off.",
        ),
        io.Combo.Input(
            "perceptual",
            options=["none", *PERCEPTUAL],
            default="none",
            advanced=True,
            optional=True,
            tooltip="Adds the distance between before and after as people see it. Needs torchmetrics and a download.",
        ),
        io.String.Input(
            "notes",
            default="",
            multiline=True,
            optional=True,
            tooltip="What a reader should know, such as model, prompt, CFG scale and seed. Printed into the page.",
        ),
        io.String.Input(
            "save_as",
            default="",
            optional=True,
            tooltip="Begin of the name of an HTML page in ComfyUI's output folder, which gets a number. Empty: no "
            "page.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="From Load CLIP Vision: adds CLIP-I, and FID and KID of its features if there are enough pictures.",
        ),
        JudgementsSocket.Input(
            "judgements",
            optional=True,
            tooltip="From Judge by Eye: adds what people found better, and what they saw changed.",
        ),
    ]


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
        pictures = [to_bytes(images) for images in rows.values() if images is not None]
        image = host.to_image(image_grid(pictures, titles.splitlines(), columns))
        return host.drawn(cls, image, image)


def untold(asked: Targets, count: int) -> list[str]:
    """A sentence if sampling did not tell which class each of `count` pictures was asked to show."""
    if asked.log.last(count) is not None or (asked.asked is not None and not asked.log.numbers):
        return []
    return [
        f"its last runs drew other pictures than these {count}, so it is not known which class each was asked to show; "
        "success is counted as if they were the first ones. Report on all pictures of the last runs, in their order."
    ]


def size_of(images: Tensor) -> str:
    n, height, width, _ = images.shape
    return f"{n} pictures of {width} x {height}"


def to_bytes(images: Tensor) -> np.ndarray:
    """Pictures (n x H x W x 3, uint8) of an IMAGE."""
    return (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def joint_attributes(text: str, classifier: ImageClassifier, attribute: str) -> tuple[str, ...]:
    """The attributes that a user names, without the report's own."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    others = [name for name in classifier.attributes if name != attribute]
    if not set(names) <= set(others):
        raise DiffLensError(
            f"joint_with {text!r} is not understood. Expected other attributes of the classifier than {attribute}, "
            f"divided by commas: {', '.join(others) or 'it knows no other'}."
        )
    return names


def what_changed(
    before: Tensor, after: Tensor, perceptual: str, embed: Callable[[Tensor], Tensor] | None,
    report: Callable[[int], None],
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """What changed between pictures of one seed, and sentences on what could not be measured."""
    networks, reasons = {}, []
    if perceptual != "none":
        try:
            device = host.training_device(NETWORK_MEMORY, "Set perceptual to none.")
            networks[perceptual] = perceptual_network(perceptual).to(device)
        except DiffLensError as error:
            reasons.append(str(error))
    found = measure_changes(before, after, networks, report)
    if embed is None:
        return found, reasons
    features = [embedded(embed, before, report, len(before)), embedded(embed, after, report, 2 * len(before))]
    more, missing = feature_changes(*features)
    return found | more, reasons + missing


def embedded(embed: Callable[[Tensor], Tensor], images: Tensor, report: Callable[[int], None], done: int) -> Tensor:
    """Features (n x d) of pictures, telling `report` of the pictures done."""
    parts = []
    for batch in images[..., :3].split(BATCH):
        parts.append(embed(batch).float().cpu())
        done += len(batch)
        report(done)
    return torch.cat(parts)
