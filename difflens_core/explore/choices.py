"""What a person chose among the features of a recipe: which of them, by which names, in which groups, how much."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..files import DiffLensError
from ..steer import Recipe, of_latents

WORDS = 80  # letters of a name
LARGEST = 100.0  # weight


@dataclass(frozen=True)
class Wish:
    """What is wished for one feature: None leaves it as it is."""

    on: bool | None = None
    weight: float | None = None
    name: str | None = None
    group: str | None = None


KINDS: dict[str, type | tuple[type, ...]] = {"on": bool, "weight": (int, float), "name": str, "group": str}


def parse_choice(text: str) -> dict[int, Wish]:
    """The wishes in the JSON that the explorer writes, by the features' numbers:

        {"features": {"17": {"on": false, "weight": 0.5, "name": "beard", "group": "hair"}}}

    An empty text wishes for nothing. Raises `DiffLensError` if it is something else.
    """
    if not text.strip():
        return {}
    try:
        features = json.loads(text)["features"]
        return {int(number): parse_wish(wish) for number, wish in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DiffLensError(
            f"choice is not what the explorer writes ({reason}). Empty it to begin anew, or choose in the explorer."
        ) from error


def parse_wish(wish: Mapping[str, Any]) -> Wish:
    """Raises `ValueError` or `TypeError` if it is none."""
    for name, value in wish.items():
        if name not in KINDS or not isinstance(value, KINDS[name]) or (name == "weight" and isinstance(value, bool)):
            raise ValueError(f"{name} cannot be {value!r:.40}")
    if not math.isfinite(weight := float(wish.get("weight", 0))) or abs(weight) > LARGEST:
        raise ValueError(f"a weight is {weight}, expected {-LARGEST:g} to {LARGEST:g}")
    words = {name: " ".join(wish[name].split())[:WORDS] for name in ("name", "group") if name in wish}
    return Wish(wish.get("on"), weight if "weight" in wish else None, **words)


def chosen(recipe: Recipe, site: str, wishes: Mapping[int, Wish], on: bool = True) -> Recipe:
    """A copy of the recipe in which the features of one of its sites are those that are wished for.

    on: whether a feature stays of which nothing is wished. A weight tells how much of its change a feature makes, 1
    being all. Names and groups are kept in info["named"]. If none is left, all stay and make no change.
    """
    parts = [choose(part, wishes, on) if part.site == site else part for part in recipe.parts]
    return replace(parts[0], further=tuple(parts[1:]))


def choose(recipe: Recipe, wishes: Mapping[int, Wish], on: bool) -> Recipe:
    """The same of a recipe of one site."""
    own = [wishes.get(number, Wish()) for number in recipe.features.tolist()]
    ticked = torch.tensor([on if wish.on is None else wish.on for wish in own])
    given = torch.ones(len(own)) if recipe.weight is None else recipe.weight.clone()
    weight = given.clone()
    for row, wish in enumerate(own):
        if wish.weight is not None:
            weight[row] = wish.weight
    if not ticked.any():
        weight, ticked = torch.zeros_like(weight), ~ticked
    found = recipe if ticked.all() else of_latents(recipe, ticked)
    if not torch.equal(weight, given):
        found = of_latents(found, torch.ones(len(found.features), dtype=torch.bool))
        found = replace(found, weight=weight[ticked])
    return with_names(found, wishes)


def with_names(recipe: Recipe, wishes: Mapping[int, Wish]) -> Recipe:
    """The recipe with names and groups of its own features alone, those that it had and those that are wished for."""
    named, given = {}, recipe.info.get("named", {})
    for number in recipe.features.tolist():
        words, wish = dict(given.get(str(number), {})), wishes.get(number, Wish())
        words |= {name: word for name in ("name", "group") if (word := getattr(wish, name)) is not None}
        if words := {name: word for name, word in words.items() if word}:
            named[str(number)] = words
    if named == given:
        return recipe
    return replace(recipe, info={name: of for name, of in recipe.info.items() if name != "named"} | {"named": named})
