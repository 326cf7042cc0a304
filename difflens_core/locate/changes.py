"""Changes: what a picture's latents do more when it shows another class, told by what they do in the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import ROWS, Activations
from ..classifiers import NO_CLASS
from ..files import DiffLensError
from ..sae import Normalisation
from .attribution import SUPPORT, tied
from .levels import Labelled, RowsOf, in_few_maps, principal

CHANGES = ("maps", "readout", "offset", "amounts")  # tensors of `Changes`
SHRINKAGE = 1000.0  # of the coefficients, in positions
AS_THEY_ARE = 0.5  # what pictures that show the class already, and are to stay, weigh beside the pairs
PATTERNS, MAPS = 48, 2  # of the readout; of the changes, times the classes
# Of a pair's difference: what is added at one step is seen by the next ones, which add to it by themselves.
SHARE = 0.8


@dataclass(frozen=True)
class Changes:
    """What F latents do more, at each step and position, in the same picture of class k.

    readout: D x F and offset: D read D patterns at every position of the finished picture, off how active the latents
    are there; maps: R x F x D, what a unit of each pattern changes; amounts: S x K x R, how much of each map it takes.
    """

    maps: Tensor
    readout: Tensor
    offset: Tensor
    amounts: Tensor

    def told(self, latents: Tensor) -> Tensor:
        """Patterns (B x D x P) of a finished picture's latents (B x F x P)."""
        return torch.matmul(self.readout, latents) + self.offset[:, None]

    def change(self, latents: Tensor, target: Tensor, step: int, maps: Tensor | None = None) -> Tensor:
        """Change (B x F x P) of such pictures to classes `target` (B) at a step.

        maps: R x W x D instead of the own, such as their rows: then it is B x W x P.
        """
        maps = self.maps if maps is None else maps
        by_pattern = (self.amounts[step, target] @ maps.flatten(1)).unflatten(1, maps.shape[1:])
        return torch.matmul(by_pattern, self.told(latents))

    def some(self, latents: Tensor) -> Changes:
        """Those of some of the latents, read off them alone: numbers, or F booleans."""
        return replace(self, maps=self.maps[:, latents], readout=self.readout[:, latents])

    def to(self, device: torch.device) -> Changes:
        """The same on a device."""
        return Changes(*(getattr(self, name).to(device) for name in CHANGES))


def alike_pairs(labels: Tensor, twins: int, others: Labelled) -> tuple[Tensor, Tensor]:
    """All pairs (n and n, numbers of pictures) from one noise that differ in their class and in nothing else.

    The first of each pair is of the lower class. labels: B, or NO_CLASS; twins: so many pictures in turn are of one
    noise; others: other attributes' classes. One that is `tied` to the classes, as grey hair is to age, may differ too.
    """
    first = torch.arange(len(labels)).repeat_interleave(twins)
    second = first // twins * twins + torch.arange(twins).repeat(len(labels))
    fits = (labels[first] != NO_CLASS) & (labels[first] < labels[second])
    for _, of in others.values():
        if not tied(labels, of):
            fits &= of[first] == of[second]
    return first[fits], second[fits]


@torch.no_grad()
def fit_changes(
    activations: Activations,
    normalisation: Normalisation,
    rows_of: RowsOf,
    labels: Tensor,
    classes: tuple[str, ...],
    others: Labelled,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Changes:
    """Changes by pairs of pictures that were drawn from the same noise, of activations whose `twins` are 2 or more.

    One ridge regression for each two classes: how much more active a the latents are in the picture of class k than in
    its twin of class l, by what the latents z of either are where it is finished, at the same position p,

        a_k,s(p) - a_l,s(p) = w_kl,s z(p) + v_kl,s,

    over all positions, pairs, and both pictures of each. What chance makes differ between the two cancels out so: by
    the first picture alone the second would be told to be nearer to the mean, in skin, hair and clothes. From these
    follows one regression for each class k of what is to change, over all captured pictures: by w_kl where class l is
    shown, by nothing where k is. So a change leaves alone what is there already. The coefficients of all steps and
    classes are put into few patterns of z, each of variance 1, and few maps of these (`in_few_maps`).
    on_batch is told how many pictures were read. Raises `DiffLensError` if two classes have fewer pairs than `SUPPORT`.
    """
    first, second = alike_pairs(labels, activations.twins, others)
    check_pairs(labels[first], labels[second], activations.twins, classes)
    sums = Sums(len(classes), len(activations.progress))
    for start, stop in whole_groups(activations):
        own = (first >= start) & (first < stop)
        sums.add(
            activations.part(start, stop), normalisation, rows_of, labels[start:stop], first[own] - start,
            second[own] - start,
        )  # fmt: skip
        on_batch(stop)
    coefficients, products = sums.solved()
    return in_patterns(SHARE * coefficients.float(), products.float())


class Sums:
    """What `fit_changes` solves, in float64: X^T X and X^T Y of rows x = (z, 1) of finished pictures.

    shown: of all pictures of each class; products, sums: of the pairs of each two classes, sums at every step.
    """

    def __init__(self, classes: int, steps: int) -> None:
        self.shown: list[Any] = [0.0] * classes
        self.products: dict[tuple[int, int], Any] = {of: 0.0 for of in combinations(range(classes), 2)}
        self.sums: dict[tuple[int, int], list[Any]] = {of: [0.0] * steps for of in self.products}

    def add(
        self, part: Activations, normalisation: Normalisation, rows_of: RowsOf, labels: Tensor, first: Tensor,
        second: Tensor,
    ) -> None:  # fmt: skip
        """Add pictures with these classes (B), of which `first` and `second` (n and n) are pairs."""

        def latents_at(s: int, which: Tensor) -> Tensor:
            values = torch.cat([values for _, values in part.batches(s)])[which]
            return rows_of(values, normalisation.step_at(float(part.progress[s])))[0].transpose(1, 2)

        steps = range(len(part.progress))
        x = F.pad(latents_at(steps[-1], torch.arange(len(labels))), (0, 1), value=1.0)
        for c in range(len(self.shown)):
            self.shown[c] += gram(x[labels == c])
        used, at = torch.cat([first, second]).unique(return_inverse=True)
        if not len(used):
            return
        one, other = at.chunk(2)
        x = x[used]
        own = {(k, m): (labels[first] == k) & (labels[second] == m) for k, m in self.products}
        for pair, of in own.items():
            self.products[pair] += gram(x[one[of]]) + gram(x[other[of]])
        for s in steps:
            z = latents_at(s, used)
            for pair, of in own.items():
                i, j = one[of], other[of]
                self.sums[pair][s] += ((x[i] + x[j]).flatten(0, 1).T @ (z[j] - z[i]).flatten(0, 1)).double()

    def solved(self) -> tuple[Tensor, Tensor]:
        """Coefficients S x K x F + 1 x F, and the mean X^T X of a row where all classes are shown alike."""
        shown = [products / products[-1, -1] for products in self.shown]
        whole = torch.stack(shown).mean(dim=0)
        unit = whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
        towards = {}
        for (k, m), products in self.products.items():
            towards[k, m] = torch.linalg.solve(products + SHRINKAGE * unit, torch.stack(self.sums[k, m]))
            towards[m, k] = -towards[k, m]
        found = []
        for c in range(len(shown)):
            rest = [k for k in range(len(shown)) if k != c]
            wanted = torch.stack([shown[k] @ towards[k, c] for k in rest]).sum(dim=0)
            seen = torch.stack([shown[k] for k in rest]).sum(dim=0) + AS_THEY_ARE * len(rest) * shown[c]
            found.append(torch.linalg.solve(seen + 1e-6 * unit, wanted))
        return torch.stack(found, dim=1), whole


def gram(x: Tensor) -> Tensor:
    """X^T X of rows (... x N), in float64."""
    flat = x.flatten(0, -2)
    return (flat.T @ flat).double()


def whole_groups(activations: Activations) -> Iterator[tuple[int, int]]:
    """Pictures start .. stop - 1 in turn, some `ROWS` positions at once and all twins of a noise together."""
    some = activations.twins * max(1, ROWS // (activations.positions * activations.twins))
    for start in range(0, activations.pictures, some):
        yield start, min(start + some, activations.pictures)


def check_pairs(first: Tensor, second: Tensor, twins: int, classes: tuple[str, ...]) -> None:
    """Raise `DiffLensError` if there are too few pairs of two classes (n and n) to learn from."""
    for k, m in combinations(range(len(classes)), 2):
        count = int(((first == k) & (second == m)).sum())
        if count < SUPPORT:
            raise DiffLensError(
                f"of the pictures that were drawn from the same noise ({twins} each), {count} pairs are {classes[k]} "
                f"and {classes[m]} with all else alike; at least {SUPPORT} are needed. Let prompts that follow one "
                "another differ in the word that names the class, and capture more pictures."
            )


def in_patterns(weights: Tensor, products: Tensor) -> Changes:
    """Coefficients S x K x F + 1 x F, the constants' last, of rows with mean products F + 1 x F + 1, as `Changes`."""
    tiny = 1e-6 * products.diagonal().mean() * torch.eye(len(products))
    root = torch.linalg.cholesky(products + tiny).T
    flat = torch.matmul(root, weights).movedim(2, 0).flatten(1)
    basis = principal(flat @ flat.T, PATTERNS)
    readout = torch.linalg.solve_triangular(root, basis, upper=True).T
    by_pattern = (basis.T @ flat).unflatten(1, (*weights.shape[:2], weights.shape[3]))
    amounts, maps = in_few_maps(by_pattern.movedim(0, -1), MAPS * weights.shape[1])
    return Changes(maps, readout[:, :-1].contiguous(), readout[:, -1].contiguous(), amounts)
