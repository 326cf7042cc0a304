"""Steer one attribute, watch the others: what recipes do to attributes that they are not about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .classifier import other_attributes
from .fairness import total_variation
from .intervals import wilson_interval
from .plots import bar_chart
from .recipes import Recipe
from .sampling import Draw
from .scan import Run
from .steering import Steering
from .targets import Targets

TOGETHER = "all together"


@dataclass(frozen=True)
class CrossEffect:
    """What steering by `steered` does to the attribute `watched`, over `pictures` that were asked to change.

    If the recipe is about it, share: of pictures that show the class asked for; else share: of pictures that change
    their class. interval: its 95 % Wilson interval. drift: total variation distance between the attribute's mix
    before and after; a large share with a small drift is chance, a large drift a trend.
    """

    steered: str
    watched: str
    asked: bool
    share: float
    interval: tuple[float, float]
    drift: float
    pictures: int


def cross_effects(
    recipes: Sequence[Recipe],
    draw: Draw,
    classify: Callable[[Tensor], dict[str, Tensor]],
    attributes: Mapping[str, tuple[str, ...]],
    pictures: int = 96,
    batch: int = 32,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> list[CrossEffect]:
    """Steer the first `pictures` noises of `draw` by every recipe alone, then by all at once, and read everything.

    classify(images) gives the class probabilities (B x K) of every one of `attributes`. Each recipe asks for its
    classes in equal shares, each attribute dealt on its own; only pictures that do not show the class asked for
    count. A row for every recipe and attribute, and if there are several recipes, of all together.
    """
    sets = [[recipe] for recipe in recipes] + ([list(recipes)] if len(recipes) > 1 else [])
    run = Run(draw, batch, pictures * (1 + len(sets)), on_picture)

    def read(edits: Callable[[Tensor], list[Steering]]) -> dict[str, np.ndarray]:
        seen = classify(run.draw(torch.arange(pictures), edits))
        return {name: seen[name].argmax(dim=1).numpy() for name in attributes}

    before, found = read(lambda which: []), []
    dealt = {
        recipe.attribute: Targets(recipe.attribute, recipe.classes, uniform(len(recipe.classes)), seed)
        for seed, recipe in enumerate(recipes)
    }
    asked = {name: targets.first(pictures) for name, targets in dealt.items()}
    for used in sets:
        after = read(lambda which, used=used: [steering(recipe, dealt[recipe.attribute], which) for recipe in used])
        title = used[0].attribute if len(used) == 1 else TOGETHER
        own = {recipe.attribute for recipe in used}
        moved = np.any([asked[name] != before[name] for name in own], axis=0)
        for name in [*dealt, *(name for name in other_attributes(attributes, "") if name not in dealt)]:
            mine = moved & (asked[name] != before[name]) if name in own else moved
            hit = after[name] == asked[name] if name in own else after[name] != before[name]
            found.append(effect(title, name, name in own, hit[mine], before[name], after[name], len(attributes[name])))
    return found


def uniform(classes: int) -> tuple[float, ...]:
    return (1 / classes,) * classes


def steering(recipe: Recipe, targets: Targets, which: Tensor) -> Steering:
    """The recipe on a batch that holds pictures `which` of the run."""
    return Steering(recipe, lambda images: targets.of(which[images]))


def effect(
    steered: str, watched: str, asked: bool, hit: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int
) -> CrossEffect:
    mixes = [np.bincount(labels, minlength=classes) / len(labels) for labels in (before, after)]
    share = float(hit.mean()) if len(hit) else 0.0
    low, high = wilson_interval(int(hit.sum()), len(hit)) if len(hit) else (0.0, 1.0)
    drift = total_variation(mixes[0], mixes[1])
    return CrossEffect(steered, watched, asked, share, (float(low), float(high)), drift, len(hit))


def cross_table(found: Sequence[CrossEffect]) -> str:
    """The rows as a matrix in words: steered attributes down, watched ones across."""
    watched = list(dict.fromkeys(row.watched for row in found))
    lines = ["share of pictures in %: * shows the class asked for, else changes its class; (drift of the mix)"]
    lines.append(f"{'steered':16}" + "".join(f"{name:>16.15}" for name in watched))
    for steered in dict.fromkeys(row.steered for row in found):
        cells = [
            f"{'*' if row.asked else ''}{100 * row.share:.0f} ({100 * row.drift:.0f})"
            for row in found
            if row.steered == steered
        ]
        lines.append(f"{steered:16.15}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def cross_chart(found: Sequence[CrossEffect]) -> np.ndarray:
    """Of every set of recipes the share of pictures that change their class in attributes not steered by it, with
    95 % intervals (440 x 720 x 3, uint8).
    """
    groups: dict[str, dict[str, float]] = {}
    whiskers: dict[str, dict[str, tuple[float, float]]] = {}
    for row in found:
        if not row.asked:
            groups.setdefault(row.steered, {})[row.watched] = row.share
            whiskers.setdefault(row.steered, {})[row.watched] = row.interval
    return bar_chart("Share of pictures that change what was not asked for", groups, None, whiskers)
