"""The commands that turn a recipe into pictures and pictures into figures: steer and report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import noise_batches
from ..classifiers import join_readings
from ..experiments import asked_shares
from ..files import DiffLensError, digest, read_json, reading, write_whole
from ..measure import measure_changes
from ..report import SHOWN, Question, report_page, report_text, share_chart, summary
from ..steer import at_dose, load_recipe, steerings
from ..targets import Targets, parse_target
from .console import Console
from .finding import RECIPE
from .models import decided_by, open_classifier, open_model
from .pictures import batches, begin_folder, in_words, read_folder, save_picture
from .study import Study

BEFORE, AFTER, ASKED = "before", "after", "asked.json"
PAGE = "report.html"


def run_steer(study: Study, console: Console) -> dict[str, Any]:
    """Draw pictures as the model draws them and steered, from the same noises."""
    options, model = study.steer, open_model(study)
    file = study.made(RECIPE, "attribute")
    recipe = at_dose(load_recipe(file), options.strength)
    if not model.owns(recipe.model):
        console.say(f"the recipe was made on other weights than those of {study.model}; it may do anything.")
    shares = asked_shares(recipe, parse_target(study.target, recipe.classes))
    targets = Targets(recipe.attribute, recipe.classes, tuple(shares.tolist()), options.seed)
    edits = {BEFORE: [], AFTER: steerings(recipe, targets.of)}
    settings = {"pictures": options.pictures, "seed": options.seed, **decided_by(model)}
    steered = {"recipe": digest(file.read_bytes()), "strength": options.strength, "target": study.target}
    console.say(f"draws {options.pictures} pictures twice into {study.folder / BEFORE} and {study.folder / AFTER}")
    with console.progress(2 * options.pictures, "pictures") as progress:
        done = 0
        for name, own in edits.items():
            there = begin_folder(study.folder / name, settings | (steered if own else {}))
            numbers = torch.arange(options.pictures).split(study.batch)
            noises = noise_batches(model.shape, options.pictures, options.seed, study.batch)
            for images, noise in zip(numbers, noises, strict=True):
                if not there.issuperset(images.tolist()):
                    drawn = model.decode(model.sample(noise, images, own))
                    for number, picture in zip(images.tolist(), drawn, strict=True):
                        save_picture(study.folder / name, number, picture)
                progress(done := done + len(images))
    asked = targets.first(options.pictures).tolist()
    write_whole(study.folder / ASKED, json.dumps({"attribute": recipe.attribute, "asked": asked}).encode())
    return run_report(study, console)


def run_report(study: Study, console: Console, before: Path | None = None, after: Path | None = None) -> dict[str, Any]:
    """Read two folders of pictures, those that steer drew if none are given, and say how fair they are."""
    asked = None if before or after else study.made(ASKED, "steer")
    folders = [before or study.folder / BEFORE, *([after or study.folder / AFTER] if after or not before else [])]
    pictures = [read_folder(folder) for folder in folders]
    if len({found.shape for found in pictures}) > 1:
        told = ", ".join(f"{folder} {in_words(found)}" for folder, found in zip(folders, pictures, strict=True))
        raise DiffLensError(f"{told}; they are compared by pairs. Give as many pictures of one size.")
    classifier, classes = open_classifier(study)
    question = Question(study.attribute, classifier.attributes, parse_target(study.target, classes))
    told = " and ".join(f"{len(found)} pictures in {folder}" for folder, found in zip(folders, pictures, strict=True))
    console.say(f"reads {study.attribute} off {told}")
    with console.progress(sum(map(len, pictures)), "pictures") as progress:
        parts: list[list[dict[str, Tensor]]] = []
        done = 0
        for found in pictures:
            parts.append([])
            for batch in batches(found, study.batch):
                parts[-1].append(classifier.classify(batch))
                progress(done := done + len(batch))
    read = [join_readings(part) for part in parts]
    assigned = read_asked(asked) if asked else None
    numbers = summary(question, read[0], read[1] if len(read) > 1 else None, assigned)
    numbers |= {"size": (pictures[0].shape[2], pictures[0].shape[1])}
    if len(pictures) == 2:
        first, second = (torch.from_numpy(found).float() / 255 for found in pictures)
        changes = measure_changes(first, second)
        numbers |= {"changes": changes, "pixel_change": changes["rmse"]}
    write_report(study, numbers, pictures)
    console.say(report_text(numbers))
    console.say(f"the same with pictures: {study.folder / PAGE}")
    return numbers


def read_asked(path: Path) -> np.ndarray:
    """The classes (n) that steered pictures were asked for, or LEFT_ALONE, as `run_steer` wrote them."""
    with reading(path):
        found = np.array(read_json(path)["asked"])
        if found.ndim != 1 or found.dtype.kind != "i":
            raise DiffLensError("it holds no list of classes. Draw the pictures again: difflens steer")
        return found


def write_report(study: Study, numbers: dict[str, Any], pictures: list[np.ndarray]) -> None:
    """The page and the figures of a report, into the study's folder."""
    first, *others = (found[:SHOWN] for found in pictures)
    page = report_page(numbers, share_chart(numbers), first, others[0] if others else None, time.strftime("%Y-%m-%d"))
    write_whole(study.folder / PAGE, page.encode())
    write_whole(study.folder / "report.json", json.dumps(numbers, indent=1, default=list).encode())
