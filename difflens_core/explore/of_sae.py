"""The latents of an SAE of which nobody has chosen any yet."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import Activations
from ..classifiers import NO_CLASS
from ..locate import auc, pooled
from ..sae import SparseAutoencoder
from ..steer import Recipe, recipe_from_features

SHOWN = 500  # latents of an SAE
NO_ATTRIBUTE = "features"


def recipe_to_choose_from(
    sae: SparseAutoencoder,
    activations: Activations,
    labels: Tensor,
    attribute: str,
    classes: tuple[str, ...],
) -> Recipe:
    """A recipe of `SHOWN` latents of an SAE, each for the class whose pictures it tells best from the others.

    labels: B, the class of each picture, or NO_CLASS. With classes those latents are taken that tell them best, else
    the most active ones, for a class of their own. Steer scales them.
    """
    means = pooled(sae, activations)[1]
    if len(classes) < 2 or len(labels[labels != NO_CLASS].unique()) < 2:
        best = means.mean(dim=0).topk(min(SHOWN, sae.latents)).indices
        return recipe_from_features(sae, attribute or NO_ATTRIBUTE, {"more": best})
    told = class_scores(means, labels, len(classes))
    best = told.amax(dim=1).topk(min(SHOWN, sae.latents)).indices
    own = told[best].argmax(dim=1)
    features = {name: best[own == k] for k, name in enumerate(classes)}
    return recipe_from_features(sae, attribute, features)


def class_scores(means: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How well each latent tells the pictures of each class from the others: AUC, F x K, .5 where that is not known.

    means: B x F, how active each latent is in each picture; labels: B, or NO_CLASS.
    """
    known, found = labels != NO_CLASS, torch.full((means.shape[1], classes), 0.5)
    for k in range(classes):
        mine = labels[known] == k
        if 0 < int(mine.sum()) < len(mine):
            found[:, k] = torch.from_numpy(auc(means[known], mine))
    return found
