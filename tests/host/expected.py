"""What the small graphs of `small_graphs.py` draw, by the core alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_graphs import AVATARS

from difflens_core.networks import load_denoiser, sample, start_noise
from difflens_core.steer import Recipe, Steering, load_recipe
from difflens_core.targets import Targets


def shipped(attribute: str, **settings: object) -> Recipe:
    recipe = load_recipe(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")
    return replace(recipe, **settings)


def sampled(recipes: list[Recipe], pictures: int, seed: int = 3, **more: object) -> torch.Tensor:
    """What `Avatars.draw` draws with those recipes for the first targets of a uniform mix."""
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    edits, deals = [], {}
    for recipe in recipes:  # every attribute is dealt beside those before it, the same one once
        shares, last = (1 / len(recipe.classes),) * len(recipe.classes), next(reversed(deals.values()), None)
        deal = deals.setdefault(recipe.attribute, Targets(recipe.attribute, recipe.classes, shares, beside=last))
        edits.append(Steering(recipe, deal.of, **more))
    return sample(model, start_noise(pictures, seed), 4, edits)
