"""Edits to compare a recipe with: what would happen without choosing features, or without an SAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..files import DiffLensError
from ..locate import Changes, LabelledPictures, channel_rows, fit_changes, fit_levels
from ..sae import SparseAutoencoder
from .recipes import ALWAYS, TWIN, Recipe


def mean_difference(recipe: Recipe, captures: Sequence[LabelledPictures]) -> Recipe:
    """The recipe with the site's channels in place of its latents: no SAE at all.

    captures: what the recipe was made of. The levels, of the first, differ by its other attributes as the recipe's
    do. Mode, strengths and probes stay, so that only what is added differs. Its "latents" are the channels: encoder and
    decoder are the identity.
    """
    channels, classes, norm = torch.eye(recipe.width), recipe.classes, recipe.normalisation
    first = captures[0]
    levels = fit_levels(first.activations, norm, channel_rows(norm), first.labels, len(classes), first.others)
    changes = recipe.changes and fit_changes(captures, norm, channels, classes)
    return replace(
        recipe,
        features=torch.arange(recipe.width),
        encoder=channels,
        bias=torch.zeros(recipe.width),
        threshold=torch.full((recipe.width,), ALWAYS),
        decoder=channels,
        member=torch.ones(len(classes), recipe.width, dtype=torch.bool),
        levels=levels,
        changes=changes,
        weight=None,
        normalisation=replace(norm, modulation=None),
        info={name: recipe.info[name] for name in ("tied",) if name in recipe.info}
        | {"control": "mean difference of the raw activations"},
    )


def random_features(recipe: Recipe, sae: SparseAutoencoder, seed: int) -> Recipe:
    """The recipe that writes into as many other latents, drawn at random: see `with_latents`."""
    others = torch.ones(sae.latents, dtype=torch.bool)
    others[recipe.features] = False
    candidates = others.nonzero().flatten()
    count = len(recipe.features)
    if len(candidates) < count:
        raise DiffLensError(f"random control: {count} other latents are needed, the SAE has {len(candidates)}.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    control = with_latents(recipe, sae, candidates[order[:count]])
    return replace(control, info={"control": "random latents of the same count and edit norm", "seed": seed})


def with_latents(recipe: Recipe, sae: SparseAutoencoder, features: Tensor) -> Recipe:
    """The recipe that writes into latents `features` (F) instead of its own, row by row.

    They are scaled so that the edit has the norm of the
    recipe's own over all steps. What it reads stays: its own latents still tell how much to change.
    """
    decoder = sae.decoder[features]
    if recipe.mode == TWIN and recipe.changes:
        own, other = (change_norm(recipe.changes, rows) for rows in (recipe.writes, decoder))
    else:
        own, other = (edit_norm(recipe.levels.dense(), rows).square().sum().sqrt() for rows in (recipe.writes, decoder))
    return replace(recipe, features=features, decoder=own / other.clamp(min=1e-12) * decoder, weight=None)


def change_norm(changes: Changes, decoder: Tensor) -> Tensor:
    """Norm of the decoded changes (decoder: F x C): their maps are told with a mean square of 1."""
    return (changes.maps @ decoder).norm()


def edit_norm(levels: Tensor, decoder: Tensor) -> Tensor:
    """Root mean square, over classes, of the decoded difference from the mean class at each step (S).

    levels: S x K x F x P; decoder: F x C.
    """
    centred = levels - levels.mean(dim=1, keepdim=True)
    return torch.stack([torch.einsum("kfp,fc->kpc", step, decoder).square().mean().sqrt() for step in centred])
