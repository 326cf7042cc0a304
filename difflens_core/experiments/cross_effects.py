"""Steer one attribute, watch the others: what recipes do to attributes that they are not about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..activations import Draw
from ..classifiers import other_attributes
from ..measure import total_variation, wilson_interval
from ..steer import Recipe, Steering
from ..targets import Targets
from .draw import Run

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
    classes in equal shares, the attributes independent of one another; only pictures that do not show the class asked
    for count. A row for every recipe and attribute, and if there are several recipes, of all together.
    """
    sets = [[recipe] for recipe in recipes] + ([list(recipes)] if len(recipes) > 1 else [])
    run = Run(draw, batch, pictures * (1 + len(sets)), on_picture)

    dealt: dict[str, Targets] = {}
    beside = None
    for recipe in recipes:
        beside = Targets(recipe.attribute, recipe.classes, uniform(len(recipe.classes)), beside=beside)
        dealt[recipe.attribute] = beside

    def read(used: Sequence[Recipe]) -> dict[str, np.ndarray]:
        def edits(which: Tensor) -> list[Steering]:
            return [steering(recipe, dealt[recipe.attribute], which) for recipe in used]

        seen = classify(run.draw(torch.arange(pictures), edits))
        return {name: seen[name].argmax(dim=1).numpy() for name in attributes}

    before, found = read([]), []
    asked = {name: targets.first(pictures) for name, targets in dealt.items()}
    for used in sets:
        after = read(used)
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
