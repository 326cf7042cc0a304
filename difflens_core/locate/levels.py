"""Levels: how active a class's pictures are, given what else they show, by one ridge regression a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import FINEST, Activations, FramedActivations, coarse
from ..classifiers import NO_CLASS
from ..sae import Normalisation, SparseAutoencoder
from .attribution import SUPPORT, foreign, seen_together
from .frames import SIDE, sides
from .probes import fit_logistic

SHRINKAGE = 5.0  # of all coefficients but the classes' own levels, in pictures
# Maps that levels are kept in: for what all classes have in common, for their differences, for what traits change.
MEANS, GAPS, EFFECTS = 4, 8, 16
PLACES = 32  # patterns over the positions that the maps are made of
WEIGHT_DECAY = 1e-3  # of the probes that read the traits

LEVELS = ("maps", "places", "classes", "effects", "weight", "bias")  # tensors of `Levels`

# Of an attribute its classes and the class (B, int64, or NO_CLASS) of every picture.
Labelled = Mapping[str, tuple[tuple[str, ...], Tensor]]
# Activations of some pictures at a step (b x C x H x W) as rows to be explained (b x F x P), and the mean over
# positions of the normalised rows that they come from (b x width).
RowsOf = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Levels:
    """How active F latents usually are at P positions, by step, class and what else a picture shows, in few maps.

    maps: R x F x D, of D patterns over the positions, places: D x P; classes: S x K x R, how much of each map there is
    at step s in class k, where all traits are alike; effects: S x K x G x R, how much more for each of G traits, the
    classes of a picture's other attributes, times its probability minus one over the number of its attribute's classes.
    weight: S x G x width and bias: S x G are probes that read the traits off the mean over positions of normalised
    rows; attributes: their classes.
    """

    maps: Tensor
    places: Tensor
    classes: Tensor
    effects: Tensor
    weight: Tensor
    bias: Tensor
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, levels: Tensor) -> Levels:
        """Levels S x K x F x P that are the same for all pictures of a class, each a map of its own."""
        steps, classes = levels.shape[:2]
        own = torch.eye(steps * classes).unflatten(0, (steps, classes))
        return cls.plain(levels.float().flatten(0, 1), torch.eye(levels.shape[3]), own)

    @classmethod
    def plain(cls, maps: Tensor, places: Tensor, classes: Tensor) -> Levels:
        """Without traits."""
        steps, count, size = classes.shape
        none = torch.zeros(steps, count, 0, size), torch.zeros(steps, 0, 0), torch.zeros(steps, 0)
        return cls(maps, places, classes, *none)

    @property
    def positions(self) -> int:
        """P, 0 if no levels are known."""
        return self.places.shape[1]

    def dense(self) -> Tensor:
        """The classes' levels without their traits: S x K x F x P."""
        return torch.einsum("skr,rfd->skfd", self.classes, self.maps) @ self.places

    def without_traits(self) -> Levels:
        """Those of pictures in which all traits are alike, whatever a picture shows."""
        return Levels.plain(self.maps, self.places, self.classes)

    def some(self, latents: Tensor) -> Levels:
        """Those of some of the latents: numbers, or F booleans."""
        return replace(self, maps=self.maps[:, latents])

    def traits(self, pooled: Tensor, step: int) -> Tensor:
        """u (B x G) of pooled rows (B x width)."""
        logits = F.linear(pooled, self.weight[step], self.bias[step])
        parts = logits.split([len(classes) for classes in self.attributes.values()], dim=1)
        return torch.cat([part.softmax(dim=1) - 1 / part.shape[1] for part in parts], dim=1)

    def amounts(self, share: Tensor, traits: Tensor | None, step: int) -> Tensor:
        """How much of each map (B x R) `share` (B x K) of the classes' levels takes, with traits u (B x G)."""
        amounts = share @ self.classes[step]
        return amounts if traits is None else amounts + torch.einsum("bk,bg,kgr->br", share, traits, self.effects[step])

    def level(self, share: Tensor, traits: Tensor | None, step: int) -> Tensor:
        """Such levels themselves: B x F x P."""
        return self.over_places(self.amounts(share, traits, step), self.maps)

    def over_places(self, amounts: Tensor, maps: Tensor) -> Tensor:
        """Such amounts (B x R) of maps (R x ... x D) at all positions: B x ... x P."""
        return (amounts @ maps.flatten(1)).unflatten(1, maps.shape[1:]) @ self.places

    def to(self, device: torch.device) -> Levels:
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in LEVELS})


def coded(labels: Tensor, classes: int) -> Tensor:
    """One column a class (B x classes), 1 where a picture is of it, minus 1 / classes; 0 throughout for NO_CLASS."""
    known = (labels != NO_CLASS)[:, None]
    return (F.one_hot(labels.clamp(min=0), classes).float() - 1 / classes) * known


def varies(classes: tuple[str, ...], labels: Tensor) -> bool:
    """Whether at least two classes of an attribute are seen in `SUPPORT` pictures or more."""
    return int((labels[labels != NO_CLASS].bincount(minlength=len(classes)) >= SUPPORT).sum()) > 1


def latent_rows(sae: SparseAutoencoder, features: Tensor) -> RowsOf:
    """Activity of the SAE's latents `features` (F), computed where the SAE is."""
    place = torch.full((sae.latents,), len(features)).scatter_(0, features, torch.arange(len(features))).to(sae.device)

    def rows_of(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
        rows = sae.rows(values.to(sae.device), step)
        latents = sae.encode_rows(rows, step)
        dense = latents.values.new_zeros(*latents.values.shape[:2], len(features) + 1)
        dense.scatter_(2, place[latents.indices], latents.values)
        return dense[..., :-1].transpose(1, 2).cpu(), rows.mean(dim=1).cpu()

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
) -> Levels:
    """Levels of every class where all traits are alike, and how they differ by trait.

    One ridge regression a step of the rows a on class c and traits u of the captured pictures,

        a = b_0 + b_c + sum_g (e_g + d_{c,g}) u_g,

    in closed form from X^T X and X^T a, so that pictures are read once a step. Shrunk are e and d, not b. A trait that
    a class shows in fewer pictures than `SUPPORT` has no e: what the others show of it must not be taken for what this
    class would. Nor have the traits of an attribute of which some are `foreign` to a class, and pictures that show such
    a trait in such a class do not count: many were misread. So what comes with a class goes with it: a picture that
    turns loses its beard, or its grey hair. The levels are b_0 + b_c; d, centred over the classes, is what tells one
    class's difference from another's and is kept. Of large maps cells are fitted, and what lies between the centres of
    cells is linear. The main effects e, the same for all classes, do what balancing
    weights did. All of it is put `in_maps`.
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
            rows = in_cells(rows, activations.map)
            found = found + torch.einsum("pb,bfi->pfi", solve[:, first : first + len(values)], rows)
            pooled.append(means)
        base, per_class = found[:1] + found[1 : 1 + classes], found[1 + classes + u.shape[1] :]
        levels.append(base - found[1 : 1 + classes].mean(dim=0))
        own_effects = per_class.reshape(classes, u.shape[1], *per_class.shape[1:])
        effects.append(own_effects - own_effects.mean(dim=0))
        probes.append(trait_probes(torch.cat(pooled), others))
        on_step(s + 1)
    weight, bias = (torch.stack(parts) for parts in zip(*probes, strict=True))
    fitted = in_maps(
        torch.stack(levels), torch.stack(effects), weight, bias, {n: names for n, (names, _) in others.items()}
    )
    return replace(fitted, places=out_of_cells(fitted.places, coarse(activations.map, FINEST), activations.full_map))


def in_cells(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows (B x F x P) of maps of that height and width as means over at most `FINEST` cells; of one position as is."""
    if rows.shape[2] <= FINEST:
        return rows
    return F.adaptive_avg_pool2d(rows.unflatten(2, size), coarse(size, FINEST)).flatten(2)


def out_of_cells(places: Tensor, cells: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patterns over so many rows and columns of cells (D x C) as patterns over a map of that height and width."""
    if cells == size or places.shape[1] == 1:
        return places
    return F.interpolate(places.unflatten(1, cells)[None], size, mode="bilinear")[0].flatten(1)


def trait_probes(pooled: Tensor, others: Labelled) -> tuple[Tensor, Tensor]:
    """Weight (G x width) and bias (G) of a logistic regression an attribute, of pooled rows (B x width)."""
    fitted = [(pooled[:0], pooled[:0, 0])]
    for names, labels in others.values():
        known = labels != NO_CLASS
        fitted.append(fit_logistic(pooled[known], labels[known], len(names), WEIGHT_DECAY))
    weight, bias = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return weight, bias


def in_maps(
    levels: Tensor, effects: Tensor, weight: Tensor, bias: Tensor, attributes: Mapping[str, tuple[str, ...]]
) -> Levels:
    """Levels (S x K x F x P) and effects (S x K x G x F x P) in few maps, see `Levels` for the rest."""
    mean = levels.mean(dim=1, keepdim=True)
    parts = in_few_maps(mean, MEANS), in_few_maps(levels - mean, GAPS), in_few_maps(effects, EFFECTS)
    maps, places = in_few_places(torch.cat([of for _, of in parts]))
    steps, classes, traits = effects.shape[:3]
    means, gaps, others = (amounts for amounts, _ in parts)
    own = torch.cat([means.expand(-1, classes, -1), gaps, levels.new_zeros(steps, classes, others.shape[3])], dim=2)
    none = levels.new_zeros(steps, classes, traits, own.shape[2] - others.shape[3])
    return Levels(maps, places, own, torch.cat([none, others], dim=3), weight, bias, attributes)


def in_few_maps(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Values (... x F x P) as amounts (... x R) of at most `rank` maps (R x F x P).

    The best there are in the least squares' sense, by the singular vectors of all values together (Eckart & Young
    1936), from the smaller side's products. Amounts are orthonormal.
    """
    flat = values.flatten(-2).flatten(0, -2)
    if not len(flat):
        return values.new_zeros(*values.shape[:-2], 0), values.new_zeros(0, *values.shape[-2:])
    basis = principal(flat @ flat.T, rank)
    return basis.unflatten(0, values.shape[:-2]), (basis.T @ flat).unflatten(1, values.shape[-2:])


def in_few_places(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (R x F x P) as R x F x D of at most `PLACES` orthonormal patterns over the positions (D x P), likewise."""
    flat = maps.flatten(0, 1)
    basis = principal(flat.T @ flat, PLACES)
    return maps @ basis, basis.T


def principal(products: Tensor, rank: int) -> Tensor:
    """The first `rank` principal directions (N x R) of products (N x N), without those in which there is nothing."""
    found, vectors = torch.linalg.eigh(products.double())
    return vectors[:, found > found[-1:] * 1e-9][:, -rank:].to(products)
