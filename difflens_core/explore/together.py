"""Latents that fire together."""

from __future__ import annotations

from collections import Counter

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

TOGETHER = 0.2  # mean correlation from which latents count as one group


def fire_together(alike: Tensor) -> Tensor:
    """Which group each latent belongs to (F): 1, 2, ... from the largest on, 0 for those that fire on their own.

    alike: F x F, correlation. Groups are joined one by one, as long as their latents correlate by `TOGETHER` on average
    (UPGMA, Sokal & Michener 1958).
    """
    if len(alike) < 2:
        return torch.zeros(len(alike), dtype=torch.int64)
    distance = (1 - (alike + alike.T) / 2).clamp(min=0).fill_diagonal_(0).double()
    tree = linkage(squareform(distance.numpy(), checks=False), "average")
    found = fcluster(tree, 1 - TOGETHER, "distance").tolist()
    sizes = Counter(found)  # in the order in which they come
    numbers = {group: number for number, (group, _) in enumerate(sizes.most_common(), 1)}
    return torch.tensor([numbers[group] if sizes[group] > 1 else 0 for group in found])
