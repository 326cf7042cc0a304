"""Levels: how active a class's pictures are, given what else they show, by one ridge regression a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import Activations, FramedActivations
from ..classifiers import NO_CLASS
from ..sae import Normalisation, SparseAutoencoder
from .attribution import SUPPORT, foreign, seen_together
from .frames import SIDE, sides
from .probes import fit_logistic

SHRINKAGE = 5.0  # of all coefficients but the classes' own levels, in pictures
RANK = 32  # maps that the coefficients are kept in
WEIGHT_DECAY = 1e-3  # of the probes that read the traits

CONTEXT = ("weight", "bias", "coefficients", "maps")  # tensors of a `Context`

# Of an attribute its classes and the class (B, int64, or NO_CLASS) of every picture.
Labelled = Mapping[str, tuple[tuple[str, ...], Tensor]]
# Activations of some pictures at a step (b x C x H x W) as rows to be explained (b x F x P), and the mean over
# positions of the normalised rows that they come from (b x width).
RowsOf = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Context:
    """How the levels of K classes differ by the traits of a picture: the classes of its other attributes, G in all.

    attributes: their classes; weight: S x G x width and bias: S x G, probes that read them off the mean over positions
    of normalised rows; coefficients: S x K x G x R and maps: R x F x P: class k's level is more by
    sum_g u_g coefficients[k, g] . maps, with u_g the trait's probability minus one over the number of its attribute's
    classes.
    """

    attributes: Mapping[str, tuple[str, ...]]
    weight: Tensor
    bias: Tensor
    coefficients: Tensor
    maps: Tensor

    def traits(self, pooled: Tensor, step: int) -> Tensor:
        """u (B x G) of pooled rows (B x width)."""
        logits = F.linear(pooled, self.weight[step], self.bias[step])
        parts = logits.split([len(classes) for classes in self.attributes.values()], dim=1)
        return torch.cat([part.softmax(dim=1) - 1 / part.shape[1] for part in parts], dim=1)

    def more(self, share: Tensor, traits: Tensor, step: int) -> Tensor:
        """What traits u (B x G) add to `share` (B x K) of each class's level: B x F x P."""
        weights = torch.einsum("bk,bg,kgr->br", share, traits, self.coefficients[step])
        return (weights @ self.maps.flatten(1)).unflatten(1, self.maps.shape[1:])

    def to(self, device: torch.device) -> Context:
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in CONTEXT})


def coded(labels: Tensor, classes: int) -> Tensor:
    """One column a class (B x classes), 1 where a picture is of it, minus 1 / classes; 0 throughout for NO_CLASS."""
    known = (labels != NO_CLASS)[:, None]
    return (F.one_hot(labels.clamp(min=0), classes).float() - 1 / classes) * known


def varies(classes: tuple[str, ...], labels: Tensor) -> bool:
    """Whether at least two classes of an attribute are seen in `SUPPORT` pictures or more."""
    return int((labels[labels != NO_CLASS].bincount(minlength=len(classes)) >= SUPPORT).sum()) > 1


def latent_rows(sae: SparseAutoencoder, features: Tensor) -> RowsOf:
    """Activity of the SAE's latents `features` (F)."""
    place = torch.full((sae.latents,), len(features)).scatter_(0, features, torch.arange(len(features)))

    def rows_of(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
        latents = sae.encode(values, step)
        dense = latents.values.new_zeros(*latents.values.shape[:2], len(features) + 1)
        dense.scatter_(2, place[latents.indices], latents.values)
        return dense[..., :-1].transpose(1, 2), sae.rows(values, step).mean(dim=1)

    return rows_of


def channel_rows(normalisation: Normalisation) -> RowsOf:
    """The site's channels themselves, normalised."""

    def rows_of(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
        rows = normalisation.apply(values, step)
        return rows.transpose(1, 2), rows.mean(dim=1)

    return rows_of


@torch.no_grad()
def fit_levels(
    activations: Activations,
    normalisation: Normalisation,
    rows_of: RowsOf,
    labels: Tensor,
    classes: int,
    others: Labelled,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, Context | None]:
    """Levels of every class (S x K x F x P, fp16) where all traits are alike, and how they differ by trait.

    One ridge regression a step of the rows a on class c and traits u of the captured pictures,

        a = b_0 + b_c + sum_g (e_g + d_{c,g}) u_g,

    in closed form from X^T X and X^T a, so that pictures are read once a step. Shrunk are e and d, not b. A trait that
    a class shows in fewer pictures than `SUPPORT` has no e: what the others show of it must not be taken for what this
    class would. Nor have the traits of an attribute of which some are `foreign` to a class, and pictures that show such
    a trait in such a class do not count: many were misread. So what comes with a class goes with it: a picture that
    turns loses its beard, or its grey hair. The levels are b_0 + b_c; d, centred over the classes, is what tells one
    class's difference from another's and is kept, in `RANK` maps. The main effects e, the same for all classes, do what
    balancing weights did.
    labels: B, NO_CLASS for a picture that does not count; others: the same of the other attributes, of which those
    count that vary. If none does, the levels are the classes' means. In their subjects' frames how large the subject is
    is one more.
    """
    if isinstance(activations, FramedActivations):
        others = {**others, SIDE: sides(activations)}
    others = {name: of for name, of in others.items() if varies(*of)}
    u, shared = torch.zeros(len(labels), 0), torch.zeros(len(labels), 0)
    for names, of in others.values():
        together = seen_together(labels, classes, of, len(names))
        strange, traits = foreign(together), coded(of, len(names))
        odd = strange[labels, of] & (labels != NO_CLASS) & (of != NO_CLASS)
        labels = labels.masked_fill(odd, NO_CLASS)
        u = torch.cat([u, traits], dim=1)
        shared = torch.cat([shared, traits * (together >= SUPPORT).all(dim=0) * ~strange.any()], dim=1)
    known = (labels != NO_CLASS).float()[:, None]
    member = F.one_hot(labels.clamp(min=0), classes).float()
    by_class = (member[:, :, None] * u[:, None]).flatten(1)
    x = (torch.cat([torch.ones(len(u), 1), member - 1 / classes, shared, by_class], dim=1) * known).double()
    penalty = torch.full((x.shape[1],), SHRINKAGE, dtype=torch.float64)
    penalty[: 1 + classes] = 1e-6
    solve = torch.linalg.solve(x.T @ x + penalty.diag(), x.T).float()  # coefficients = solve @ rows
    levels, effects, probes = [], [], []
    for s, progress in enumerate(activations.progress):
        step, found, pooled = normalisation.step_at(float(progress)), torch.zeros(()), []
        for first, values in activations.batches(s):
            rows, means = rows_of(values, step)
            found = found + torch.einsum("pb,bfi->pfi", solve[:, first : first + len(values)], rows)
            pooled.append(means)
        base, per_class = found[:1] + found[1 : 1 + classes], found[1 + classes + u.shape[1] :]
        levels.append((base - found[1 : 1 + classes].mean(dim=0)).half())
        own_effects = per_class.unflatten(0, (classes, -1))
        effects.append(own_effects - own_effects.mean(dim=0))
        if others:
            probes.append(trait_probes(torch.cat(pooled), others))
        on_step(s + 1)
    if not others:
        return torch.stack(levels), None
    coefficients, maps = in_few_maps(torch.stack(effects), RANK)
    weight, bias = (torch.stack(parts) for parts in zip(*probes, strict=True))
    attributes = {name: names for name, (names, _) in others.items()}
    return torch.stack(levels), Context(attributes, weight, bias, coefficients, maps)


def trait_probes(pooled: Tensor, others: Labelled) -> tuple[Tensor, Tensor]:
    """Weight (G x width) and bias (G) of a logistic regression an attribute, of pooled rows (B x width)."""
    fitted = []
    for names, labels in others.values():
        known = labels != NO_CLASS
        fitted.append(fit_logistic(pooled[known], labels[known], len(names), WEIGHT_DECAY))
    weight, bias = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return weight, bias


def in_few_maps(effects: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Effects (S x K x G x F x P) as coefficients (S x K x G x R) of at most `rank` maps (R x F x P).

    The best there are in the least squares' sense, by the singular vectors of all effects together (Eckart & Young
    1936), from the smaller side's products.
    """
    flat = effects.flatten(3).flatten(0, 2)
    values, vectors = torch.linalg.eigh((flat @ flat.T).double())
    basis = vectors[:, values > values[-1] * 1e-9][:, -rank:].float()  # orthonormal combinations of the effects
    return basis.unflatten(0, effects.shape[:3]), (basis.T @ flat).unflatten(1, effects.shape[3:])
