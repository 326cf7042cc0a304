"""Does calibration meet its targets unattended, and what does it cost? The avatars, five biased starts.

    python benchmarks/calibrate.py                   ten calibrations, then 2048 fresh pictures of each attribute
    python benchmarks/calibrate.py --pictures 512    fewer fresh pictures
    python benchmarks/calibrate.py --json FILE       the same numbers for machines

Every calibration starts from the recipe at strength 1. A start is the model as it is or the noises of a run of which
some were left out, and a target mix. `reached`: on fresh noises the 95 % interval of the counted FD ends below
0.05. Then the recipes that were calibrated for uniform shares of the model as it is draw pictures of a seed
that nothing was tuned on, planned so that as few as possible change: each attribute alone, and all three at once
(24 combinations). `must`: the share that has to change, the total variation distance between the two mixes; `ratio`:
changed to must.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from debias import ATTRIBUTES, AVATARS, BATCH, STEPS, Read, run
from precision import PRECISION, at_precision
from torch import Tensor

from difflens_core.activations import Drawer
from difflens_core.classifiers import AttributeClassifier, load_classifier
from difflens_core.experiments import CalibrationOptions, asked_shares, calibrate
from difflens_core.measure import joint_report, kept_attributes, measure_fairness, paired_test
from difflens_core.measure.fairness import Report
from difflens_core.measure.significance import PairedTest
from difflens_core.networks import Denoiser, DenoiserSampler, load_denoiser, start_noise
from difflens_core.steer import Recipe, Steering, load_recipe, planned_targets, with_settings
from difflens_core.targets import Targets, joint_shares, parse_target

FRESH_SEED = 95_001
SEEDS = (61, 62)


@dataclass(frozen=True)
class Start:
    """A biased start: noises of the model as it is, of which those of class `dropped` stay with chance `left`."""

    attribute: str
    target: str
    dropped: str = ""
    left: float = 1.0


STARTS = (
    Start("presentation", "uniform"),
    Start("age", "uniform"),
    Start("skin_tone", "uniform"),
    Start("presentation", "masculine: 3, feminine: 7", "feminine", 0.3),
    Start("age", "young: 1, adult: 1, senior: 2", "young", 0.3),
)


def kept_noises(model: Denoiser, classifier: AttributeClassifier, start: Start, count: int, seed: int) -> Tensor:
    """`count` noises of the start."""
    noise = start_noise(2 * count if start.dropped else count, seed)
    if not start.dropped:
        return noise
    draw, numbers = Drawer(DenoiserSampler(model, STEPS), noise), torch.arange(len(noise))
    read = [classifier.classify(draw([], part))[start.attribute] for part in numbers.split(BATCH)]
    dropped = torch.cat(read).argmax(dim=1) == classifier.attributes[start.attribute].index(start.dropped)
    chance = torch.rand(len(noise), generator=torch.Generator().manual_seed(seed))
    return noise[~dropped | (chance < start.left)][:count]


def calibrate_start(model: Denoiser, classifier: AttributeClassifier, start: Start, seed: int) -> tuple[Recipe, float]:
    """The calibrated recipe and the seconds it took."""
    recipe = load_recipe(AVATARS / "difflens_recipes" / f"avatars_{start.attribute}.safetensors")
    options = CalibrationOptions(only_where_needed=True, seed=seed)
    noise = kept_noises(model, classifier, start, 2 * options.pictures, seed)
    began = time.time()
    found = calibrate(
        with_settings(recipe, strength=1.0), Drawer(DenoiserSampler(model, STEPS), noise),
        lambda pictures: classifier.classify(pictures)[start.attribute],
        parse_target(start.target, recipe.classes), options, BATCH,
    )  # fmt: skip
    return found, time.time() - began


def planned_run(
    model: Denoiser, classifier: AttributeClassifier, recipes: list[Recipe], before: Read
) -> tuple[Read, tuple[Targets, ...]]:
    """Pictures under the plan for these recipes, and the targets."""
    own = {recipe.attribute: before.shown(recipe.attribute).numpy() for recipe in recipes}
    shares = {
        recipe.attribute: asked_shares(recipe, parse_target("uniform", recipe.classes), only_where_needed=True)
        for recipe in recipes
    }
    targets = planned_targets(own, {recipe.attribute: recipe.classes for recipe in recipes}, shares, FRESH_SEED)
    moved = torch.from_numpy(np.flatnonzero(targets[0].moved))
    after = before.pictures.clone()
    draw = Drawer(DenoiserSampler(model, STEPS), start_noise(len(after), FRESH_SEED))
    for which in moved.split(BATCH):
        edits = [
            Steering(recipe, lambda images, part=part, which=which: part.of(which[images]))
            for recipe, part in zip(recipes, targets, strict=True)
        ]
        after[which] = draw(edits, which)
    return Read.of(after, classifier), targets


def figures(
    before: Read, after: Read, fairness: list[Report], success: float, pairs: PairedTest, kept: Iterable[float]
) -> dict:
    """A row of the table; `fairness`: the reports before and after."""
    same = (before.pictures == after.pictures).flatten(1).all(dim=1)
    return {
        "fd_before": fairness[0].fd, "fd": fairness[1].fd, "fd_ci": fairness[1].fd_ci, "fd_hard": fairness[1].fd_hard,
        "success": success, "changed": pairs.changed, "must": pairs.needed, "untouched": float(same.float().mean()),
        "kept": float(np.mean([*kept])),
    }  # fmt: skip


def one_attribute(before: Read, after: Read, targets: Targets) -> dict:
    """Fairness of one attribute, how many pictures changed their class, what else was kept."""
    name, uniform = targets.attribute, parse_target("uniform", targets.classes)
    labels = [side.shown(name).numpy() for side in (before, after)]
    fairness = [
        measure_fairness(side.seen[name].numpy(), uniform, name, targets.classes, asked)
        for side, asked in ((before, None), (after, targets.first(len(labels[0]))))
    ]
    kept = kept_attributes(before.seen, after.seen, name).values()
    return figures(before, after, fairness, fairness[1].success, paired_test(*labels, uniform), kept)


def all_at_once(before: Read, after: Read, targets: tuple[Targets, ...]) -> dict:
    """Joint fairness over all combinations of the attributes' classes."""
    names = [part.attribute for part in targets]
    classes = {part.attribute: part.classes for part in targets}
    shares = {name: parse_target("uniform", classes[name]) for name in names}
    sides = [{name: side.seen[name].numpy() for name in names} for side in (before, after)]
    fairness = [joint_report(side, classes, shares).report for side in sides]
    sizes = joint_shares([*shares.values()]).shape
    cells = [np.ravel_multi_index([side[name].argmax(axis=1) for name in names], sizes) for side in sides]
    asked = np.ravel_multi_index([part.first(len(cells[0])) for part in targets], sizes)
    pairs = paired_test(*cells, joint_shares([*shares.values()]).ravel())
    kept = kept_attributes(before.seen, after.seen, "")
    others = (share for name, share in kept.items() if name not in names)
    return figures(before, after, fairness, float((cells[1] == asked).mean()), pairs, others)


def row(name: str, result: dict) -> str:
    low, high = result["fd_ci"]
    shares = "  ".join(f"{100 * result[key]:7.1f}" for key in ("changed", "must", "untouched", "kept"))
    return (
        f"{name:16s} {result['fd_before']:.3f}   {result['fd']:.3f} [{low:.3f}, {high:.3f}] {result['fd_hard']:.3f}   "
        f"{result['success']:.3f}  {shares}   {result['changed'] / result['must']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = at_precision(load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors"))
    classifier = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    results: dict[str, list | dict] = {"calibrations": []}
    recipes: dict[str, Recipe] = {}
    print(f"{STEPS} steps, {PRECISION}")
    print("attribute     target                        seed  FD before  after  reached  pictures  seconds  strengths")
    for seed in SEEDS:
        for start in STARTS:
            found, seconds = calibrate_start(model, classifier, start, seed)
            record = found.info["calibration"]
            if not start.dropped:
                recipes.setdefault(start.attribute, found)
            results["calibrations"].append(record | {"seconds": seconds, "attribute": start.attribute, "seed": seed})
            print(
                f"{start.attribute:12}  {start.target:28}  {seed:4}  {record['start']['fd']:9.3f}  "
                f"{record['fresh']['fd']:.3f}  {record['reached']!s:7}  {record['drawn']:8}  {seconds:7.0f}  "
                f"{', '.join(f'{s:.2f}' for s in found.strength)}",
                flush=True,
            )
    print(f"\n{options.pictures} fresh pictures, {STEPS} steps, seed {FRESH_SEED}; changed to kept in %")
    print("                 before   FD [95 % interval] counted  success  changed     must  untouched  kept   ratio")
    before = Read.of(run(model, options.pictures, seed=FRESH_SEED)[0], classifier)
    for chosen in (*([name] for name in ATTRIBUTES), ATTRIBUTES):
        after, targets = planned_run(model, classifier, [recipes[name] for name in chosen], before)
        name = chosen[0] if len(chosen) == 1 else "all three"
        results[name] = (
            one_attribute(before, after, targets[0]) if len(chosen) == 1 else all_at_once(before, after, targets)
        )
        print(row(name, results[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
