"""Steer one attribute, watch the others: what recipes do to attributes that they are not about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..activations import Draw
from ..classifiers import NO_CLASS, other_attributes, seen, seen_classes
from ..files import DiffLensError
from ..measure import total_variation, wilson_interval
from ..sae import SparseAutoencoder
from ..steer import Recipe, Steering, steerings
from ..targets import Targets
from .draw import Run

TOGETHER = "all together"


@dataclass(frozen=True)
class CrossEffect:
    """What steering by `steered` does to the attribute `watched`, over `pictures` that were asked to change.

    If the recipe is about it, share: of pictures that show the class asked for; else share: of pictures that change
    their class. interval: its 95 % Wilson interval. drift: total variation distance between the attribute's mix
    before and after; a large share with a small drift is chance, a large drift a trend. uncounted: pictures of the run
    without a face before or after, which do not count.
    """

    steered: str
    watched: str
    asked: bool
    share: float
    interval: tuple[float, float]
    drift: float
    pictures: int
    uncounted: int = 0


def cross_effects(
    recipes: Sequence[Recipe],
    draw: Draw,
    classify: Callable[[Tensor], dict[str, Tensor]],
    attributes: Mapping[str, tuple[str, ...]],
    pictures: int = 96,
    batch: int = 32,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    sae: SparseAutoencoder | None = None,
    on_found: Callable[[Sequence[CrossEffect]], None] = lambda found: None,
) -> list[CrossEffect]:
    """Steer the first `pictures` noises of `draw` by every recipe alone, then by all at once, and read everything.

    classify(images) gives the class probabilities (B x K) of every one of `attributes`. Each recipe asks for its
    classes in equal shares, the attributes independent of one another; only pictures that do not show the class asked
    for count. A row for every recipe and attribute, and if there are several recipes, of all together. sae: of the
    recipes that need theirs. on_found is told all rows so far, whenever there are more.
    """
    if not set(other_attributes(attributes, "")) - {recipes[0].attribute}:
        raise DiffLensError(
            f"the classifier knows nothing but {recipes[0].attribute}, so there is nothing else to watch. Use one that "
            "knows several attributes."
        )
    sets = [[recipe] for recipe in recipes] + ([list(recipes)] if len(recipes) > 1 else [])
    run = Run(draw, batch, pictures * (1 + len(sets)), on_picture)
    order = shuffled(pictures)
    dealt: dict[str, Targets] = {}
    beside = None
    for recipe in recipes:
        beside = Targets(recipe.attribute, recipe.classes, uniform(len(recipe.classes)), beside=beside)
        dealt[recipe.attribute] = beside

    def read(used: Sequence[Recipe]) -> dict[str, np.ndarray]:
        def edits(which: Tensor) -> list[Steering]:
            return [edit for recipe in used for edit in of_batch(recipe, dealt[recipe.attribute], order[which], sae)]

        readings = classify(run.draw(torch.arange(pictures), edits))
        return {name: seen_classes(seen(readings, name)).numpy() for name in attributes}

    before, found = read([]), []
    asked = {name: targets.first(pictures)[order] for name, targets in dealt.items()}
    for used in sets:
        after = read(used)
        title = used[0].attribute if len(used) == 1 else TOGETHER
        own = {recipe.attribute for recipe in used}
        moved = np.any([asked[name] != before[name] for name in own], axis=0)
        for name in [*dealt, *(name for name in other_attributes(attributes, "") if name not in dealt)]:
            mine = moved & (asked[name] != before[name]) if name in own else moved
            hit = after[name] == asked[name] if name in own else after[name] != before[name]
            known = (before[name] != NO_CLASS) & (after[name] != NO_CLASS)
            mixes = before[name][known], after[name][known]
            found.append(effect(title, name, name in own, hit[mine & known], *mixes, len(attributes[name]), pictures))
        on_found(found)
    return found


def shuffled(pictures: int) -> Tensor:
    """Which number of the deal each picture has: classes come nearly in turn there, and so may prompts of pictures."""
    return torch.randperm(pictures, generator=torch.Generator().manual_seed(0))


def uniform(classes: int) -> tuple[float, ...]:
    return (1 / classes,) * classes


def of_batch(recipe: Recipe, targets: Targets, which: Tensor, sae: SparseAutoencoder | None) -> list[Steering]:
    """The recipe on a batch that holds pictures `which` of the deal, without the SAE if it can."""
    return steerings(recipe, lambda images: targets.of(which[images]), sae if recipe.needs_sae else None)


def effect(
    steered: str, watched: str, asked: bool, hit: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int,
    pictures: int,
) -> CrossEffect:  # fmt: skip
    """A row from the pictures that were asked to change (`hit`) and the classes of all that count, of `pictures`."""
    mixes = [np.bincount(labels, minlength=classes) / max(1, len(labels)) for labels in (before, after)]
    share = float(hit.mean()) if len(hit) else 0.0
    low, high = wilson_interval(int(hit.sum()), len(hit)) if len(hit) else (0.0, 1.0)
    drift = total_variation(mixes[0], mixes[1])
    return CrossEffect(
        steered, watched, asked, share, (float(low), float(high)), drift, len(hit), pictures - len(before)
    )
