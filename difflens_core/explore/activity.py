"""Where and when the latents of a recipe fire in pictures that were captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import Activations
from ..classifiers import NO_CLASS
from ..files import DiffLensError
from ..sae import SparseAutoencoder
from ..steer import Recipe, Steering

PICTURES = 2048  # are looked at, if there are more
TOP = 6  # pictures that are kept of each latent
RIVALS = 8  # latents that are kept of each position, the most active ones
CHUNK = 2**23  # numbers of the latents' maps that are held at once


@dataclass(frozen=True)
class Activity:
    """What F latents do in B pictures, at S steps and the positions of a map of H x W.

    A latent's map of a picture is its mean over the steps, the picture's peak that map's largest number.

    features: F; top: F x T, the pictures with the largest peaks, largest first; peak: F x T, those; heat: F x T x H x
    W, their maps; by_class: F x K x S, mean over the pictures of each class and over the positions, at each step (0
    where no picture shows the class); pictures: K, how many do; fires: F, share of all steps, pictures and positions
    at which the latent is active; means: B x F, of the maps; alike: F x F, correlation of the maps over pictures and
    positions, 0 for a latent that never fires; strongest: B x H x W x R, rows of the most active latents at each
    position, most active first, and strength: B x H x W x R, how active they are.
    """

    features: Tensor
    top: Tensor
    peak: Tensor
    heat: Tensor
    by_class: Tensor
    pictures: Tensor
    fires: Tensor
    means: Tensor
    alike: Tensor
    strongest: Tensor
    strength: Tensor

    @property
    def shown(self) -> Tensor:
        """The pictures that are among the top ones of any latent, ascending."""
        return self.top.unique()


def check_explored(recipe: Recipe, activations: Activations, sae: SparseAutoencoder | None) -> None:
    """Raise `DiffLensError` unless the latents of a recipe of one site can be read off the activations."""
    if (recipe.site, recipe.channels) != (activations.site, activations.width):
        raise DiffLensError(
            f"the activations are of {activations.site} ({activations.width} wide), the recipe for {recipe.attribute} "
            f"of {recipe.site} ({recipe.channels} wide). Capture at the recipe's site, under the same name."
        )
    if recipe.kernel > 1 and activations.map != (recipe.kernel, recipe.kernel):
        raise DiffLensError(
            f"the recipe for {recipe.attribute} reads a whole map of {recipe.kernel} x {recipe.kernel}, the "
            f"activations are of {' x '.join(map(str, activations.map))}. Capture at the size that it was made on."
        )
    if recipe.needs_sae and sae is None:
        raise DiffLensError(
            f"only its SAE can tell where the features of the recipe for {recipe.attribute} fire. Connect the SAE "
            "as well."
        )


@torch.no_grad()
def observe(
    recipe: Recipe,
    activations: Activations,
    labels: Tensor,
    classes: int,
    sae: SparseAutoencoder | None = None,
    device: torch.device | str = "cpu",
    on_picture: Callable[[int], None] = lambda done: None,
) -> Activity:
    """What the latents of a recipe of one site do in the first `PICTURES` pictures.

    labels: B, the class of each picture, or NO_CLASS; sae: the one that the recipe was made from, which tells exactly
    where its latents are among the k largest. It is computed on `device`, in fp32, some pictures at a time.
    on_picture(done) may raise to cancel.
    """
    check_explored(recipe, activations, sae)
    activations = activations.part(0, PICTURES)
    count, (height, width) = activations.pictures, (1, 1) if recipe.kernel > 1 else activations.map
    features, places, steps = len(recipe.features), height * width, len(activations.progress)
    member = F.one_hot(labels[:count].clamp(min=0), classes).float() * (labels[:count] != NO_CLASS)[:, None]
    by_class, fires = torch.zeros(steps, classes, features), torch.zeros(features, dtype=torch.float64)
    total, products = fires.clone(), torch.zeros(features, features, dtype=torch.float64)
    top, peak, heat = torch.zeros(features, 0).long(), torch.zeros(features, 0), torch.zeros(features, 0, places)
    means, strongest, strength = [], [], []
    for first, read in latent_maps(recipe, activations, sae, device):
        own = slice(first, first + read.shape[1])
        by_class += torch.einsum("sbf,bk->skf", read.mean(dim=3), member[own])
        fires += (read > 0).sum(dim=(0, 1, 3))
        maps = read.mean(dim=0)  # b x F x P
        means.append(maps.mean(dim=2))
        rows = maps.transpose(1, 2).flatten(0, 1)
        total, products = total + rows.double().sum(dim=0), products + (rows.T @ rows).double()
        found = maps.topk(min(RIVALS, features), dim=1)
        strongest.append(found.indices.transpose(1, 2))
        strength.append(found.values.transpose(1, 2))
        top = torch.cat([top, torch.arange(own.start, own.stop).expand(features, -1)], dim=1)
        peak, heat = torch.cat([peak, maps.amax(dim=2).T], dim=1), torch.cat([heat, maps.transpose(0, 1)], dim=1)
        best = peak.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
        top, peak = top.gather(1, best), peak.gather(1, best)
        heat = heat.gather(1, best[:, :, None].expand(-1, -1, places))
        on_picture(own.stop)
    seen = member.sum(dim=0)
    shape = (count, height, width, -1)
    return Activity(
        recipe.features, top, peak, heat.unflatten(2, (height, width)),
        (by_class / seen.clamp(min=1)[:, None]).permute(2, 1, 0), seen.long(),
        (fires / (count * steps * places)).float(), torch.cat(means), correlation(total, products, count * places),
        torch.cat(strongest).reshape(shape), torch.cat(strength).reshape(shape),
    )  # fmt: skip


def latent_maps(
    recipe: Recipe, activations: Activations, sae: SparseAutoencoder | None, device: torch.device | str
) -> Iterator[tuple[int, Tensor]]:
    """Number of the first of some pictures, and how active the recipe's latents are in them: S x b x F x P."""
    edit = Steering(replace(recipe, mode="add fixed"), torch.Tensor.long, sae)  # a mode that needs nothing else
    steps, places = len(activations.progress), 1 if recipe.kernel > 1 else activations.positions
    size = max(1, CHUNK // (steps * len(recipe.features) * places))
    for first in range(0, activations.pictures, size):
        part, read = activations.part(first, first + size), []
        for s, progress in enumerate(part.progress.tolist()):
            step = recipe.normalisation.step_at(progress)
            t, batches = edit.tensors(torch.device(device)), (h.to(device) for _, h in part.batches(s))
            read.append(torch.cat([edit.read(recipe.columns(h), step, t).cpu() for h in batches]))
        yield first, torch.stack(read)


def correlation(total: Tensor, products: Tensor, count: int) -> Tensor:
    """Correlation (F x F) of F numbers by their sums (F) and products (F x F) over `count` rows."""
    covariance = products / count - torch.outer(total, total) / count**2
    spread = covariance.diagonal().clamp(min=0).sqrt()
    known = spread > 1e-6 * spread.amax().clamp(min=1e-30)
    found = covariance / torch.outer(spread, spread).clamp(min=1e-300)
    return (found * torch.outer(known, known)).clamp(-1, 1).float()


@torch.no_grad()
def probe_classes(recipe: Recipe, activations: Activations) -> Tensor | None:
    """The class (B) that the recipe's own probes read off each picture at the last step, None if it has no probes."""
    if not recipe.probe_weight.any():
        return None
    edit, last, read = Steering(replace(recipe, mode="add fixed"), torch.Tensor.long), len(activations.progress) - 1, []
    step = recipe.normalisation.step_at(float(activations.progress[last]))
    for _, h in activations.batches(last):
        t = edit.tensors(h.device)
        pooled = edit.pooled(edit.columns(h, edit.frames(h, step, t)), step, t)
        read.append(F.linear(pooled, t["probe_weight"][step], t["probe_bias"][step]).argmax(dim=1))
    return torch.cat(read)
