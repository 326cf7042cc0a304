"""Which sites of a model control an attribute, and when: class means of the activations, before any SAE exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import Draw
from ..classifiers import NO_CLASS, seen, seen_classes
from ..files import DiffLensError
from ..measure import kept_attributes, pixel_change
from ..sae import nearest_step
from .draw import Run, shown_classes

# Part of the sampling: (start, end, sign of the strength).
WHOLE = "whole"
PARTS = {
    WHOLE: (0.0, 1.0, 1),
    "first third": (0.0, 1 / 3, 1),
    "middle third": (1 / 3, 2 / 3, 1),
    "last third": (2 / 3, 1.0, 1),
    "reversed": (0.0, 1.0, -1),
}


@dataclass(frozen=True)
class Collector:
    """Edit that changes nothing and sums what the site puts out, by progress and by the picture's class.

    labels: B, the classes of the batch's pictures; those of NO_CLASS are left out. sums: K x C x H x W and counts: K
    for every progress met, in main memory.
    """

    site: str
    labels: Tensor
    sums: dict[float, Tensor]
    counts: dict[float, Tensor]
    classes: int

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        if h.ndim != 4:
            raise DiffLensError(f"{self.site} puts out {h.ndim} dimensions, expected 4. Leave this site out.")
        own = self.labels[images]
        if progress not in self.sums:
            self.sums[progress] = torch.zeros(self.classes, *h.shape[1:])
        known = own != NO_CLASS
        self.sums[progress].index_add_(0, own[known], h.cpu()[known].float())
        self.counts[progress] = self.counts.get(progress, 0) + torch.bincount(own[known], minlength=self.classes)
        return h


@dataclass(frozen=True)
class ClassMeans:
    """Mean output of a site in the pictures of each class: means[s] is K x C x H x W, at progress[s]."""

    site: str
    progress: Tensor
    means: list[Tensor]

    @classmethod
    def of(cls, collector: Collector) -> ClassMeans:
        """From a finished collection."""
        if not collector.sums:
            raise DiffLensError(f"{collector.site} was never run while the model sampled. Leave this site out.")
        means = [total / collector.counts[at][:, None, None, None] for at, total in collector.sums.items()]
        return cls(collector.site, torch.tensor([*collector.sums]), means)


@dataclass(frozen=True)
class MeanShift:
    """Edit h' = h + strength (1 - way) d with d = mean_target - mean_own, between `start` and `end` of the sampling.

    way = <h - mean_own, d> / <d, d>, kept to 0..1, is how far the picture has come: what earlier steps have done is
    not done again, or classes in the middle would be overshot. own, target: B, classes.
    """

    means: ClassMeans
    own: Tensor
    target: Tensor
    strength: float
    start: float
    end: float

    @property
    def site(self) -> str:
        return self.means.site

    def of_batch(self, rows: Tensor) -> MeanShift:
        """The edit of a batch that holds `rows` of the pictures."""
        return replace(self, own=self.own[rows], target=self.target[rows])

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        if not self.start <= progress <= self.end:
            return h
        means = self.means.means[nearest_step(self.means.progress, progress)]
        start = means[self.own[images]].to(h.device)
        step = means[self.target[images]].to(h.device) - start
        way = ((h.float() - start) * step).flatten(1).sum(dim=1) / step.square().flatten(1).sum(dim=1).clamp(1e-12)
        return h + (self.strength * (1 - way.clamp(0, 1))[:, None, None, None] * step).to(h.dtype)


@dataclass(frozen=True)
class SiteEffect:
    """What mean-difference steering at `site` in a part of the sampling does to pictures of the other classes.

    Of several sites, " + " stands between their names.

    success: share that shows the class asked for (none did before), the mean over classes; per_class: of each class,
    None for one that was too rare to have means; kept: share that keeps its class, mean over the other attributes,
    None if there are none; change: mean pixel difference, of 1; no_face: share of the steered pictures in which no face
    was found, which do not count for success and kept.
    """

    site: str
    part: str
    success: float
    per_class: tuple[float | None, ...]
    kept: float | None
    change: float
    no_face: float = 0.0


def scan_sites(
    sites: Sequence[str],
    draw: Draw,
    classify: Callable[[Tensor], dict[str, Tensor]],
    attribute: str,
    classes: tuple[str, ...],
    pictures: int = 128,
    per_class: int = 8,
    strength: float = 1.0,
    batch: int = 32,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    parts: Sequence[str] = tuple(PARTS),
    unsteered: Tensor | None = None,
    together: int = 1,
    on_found: Callable[[Sequence[SiteEffect]], None] = lambda found: None,
) -> list[SiteEffect]:
    """Try every site and part of the sampling (some of PARTS): one row each, site by site.

    classify(images) gives the class probabilities (B x K) of every attribute. The `pictures` first noises of `draw` are
    sampled twice, to read their classes and then to take each site's class means (all sites at once; a site takes steps
    x K x C x H x W numbers). Then up to `per_class` pictures that do not show a class are steered to it. Classes that
    fewer than two pictures show are left out, and so are pictures without a face. unsteered: the pictures of those
    noises, if they were drawn before. on_picture(done, total) may raise to cancel.

    on_found is told all rows so far, whenever there is another.

    together: while no set of sites turns every picture, the two sites that do best alone over the whole sampling are
    then steered together, the three that do, up to so many.
    """
    first_draws = (1 if unsteered is not None else 2) * pictures
    run = Run(draw, batch, first_draws + len(sites) * len(parts) * len(classes) * per_class, on_picture)
    numbers = torch.arange(pictures)
    base = run.draw(numbers, lambda rows: []) if unsteered is None else unsteered
    labels = seen_classes(seen(classify(base), attribute)).cpu()
    tried = shown_classes(labels, attribute, classes)
    collections: list[tuple[dict[float, Tensor], dict[float, Tensor]]] = [({}, {}) for _ in sites]

    def collectors(rows: Tensor) -> list[Collector]:
        pairs = zip(sites, collections, strict=True)
        return [Collector(site, labels[rows], *kept, len(classes)) for site, kept in pairs]

    run.draw(numbers, collectors)
    others = {c: ((labels != c) & (labels != NO_CLASS)).nonzero().flatten()[:per_class] for c in tried}
    chosen, before = torch.cat([*others.values()]), base[torch.cat([*others.values()])]
    target = torch.cat([torch.full_like(pictures, c) for c, pictures in others.items()])
    run.total = run.done + len(sites) * len(parts) * len(chosen)
    first, means = (before, classify(before)), [ClassMeans.of(collector) for collector in collectors(numbers)]

    found: list[SiteEffect] = []

    def steered(some: Sequence[ClassMeans], part: str) -> None:
        start, end, sign = PARTS[part]
        edits = [MeanShift(of, labels[chosen], target, sign * strength, start, end) for of in some]
        after = run.draw(chosen, lambda rows: [edit.of_batch(rows) for edit in edits])
        name = " + ".join(of.site for of in some)
        found.append(site_effect(name, part, first, (after, classify(after)), target, attribute, classes))
        on_found(found)

    for of in means:
        for part in parts:
            steered([of], part)
    alone = sorted((row for row in found if row.part == WHOLE), key=lambda row: (-row.success, -row.change))
    for count in range(2, min(together, len(alone)) + 1):
        if max(row.success for row in found) == 1:
            break
        best = {row.site for row in alone[:count]}
        run.total += len(chosen)
        steered([of for of in means if of.site in best], WHOLE)
    return found


Read = tuple[Tensor, dict[str, Tensor]]  # pictures, and the class probabilities of every attribute


def site_effect(
    site: str, part: str, before: Read, after: Read, target: Tensor, attribute: str, classes: tuple[str, ...]
) -> SiteEffect:
    """What steering pictures to `target` (B, classes) at `site` did, from the pictures before and after."""
    shown = seen_classes(seen(after[1], attribute)).cpu()
    counted = shown != NO_CLASS
    rates = {
        c: float((shown[mine] == c).float().mean()) if (mine := counted & (target == c)).any() else 0.0
        for c in target.unique().tolist()
    }
    kept = kept_attributes(before[1], after[1], attribute)
    return SiteEffect(
        site,
        part,
        sum(rates.values()) / len(rates),
        tuple(rates.get(c) for c in range(len(classes))),
        sum(kept.values()) / len(kept) if kept else None,
        pixel_change(before[0].cpu().numpy(), after[0].cpu().numpy()),
        float(1 - counted.float().mean()),
    )
