"""The measurements of a diagnosis: the same pictures steered by several doses and parts of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..classifiers import NO_CLASS, seen, seen_classes
from ..files import DiffLensError
from ..locate import contrast
from ..measure import pixel_change
from ..sae import SparseAutoencoder
from ..steer import Recipe, Steering, random_features, steerings, with_latents, with_settings
from .draw import Run
from .effects import keep_best

# Unsteered pictures for every picture steered to a class: enough of a class that one picture in four shows.
UNSTEERED = 4
# Times the recipe's own strength. Reversed too: pictures of other classes have no probability to lose.
DOSES = (-1.0, 0.5, 1.0, 1.5, 2.0)
# Shares of every class's features, best first, all of them last.
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Outcome:
    """What one edit did to the same n pictures of other classes.

    probability: n, of the class asked for; hit: n, whether the picture shows it; both NaN where no face was found:
    these pictures do not count. change: mean pixel difference, of 1; per_class: share of hits by the class asked for.
    """

    probability: np.ndarray
    hit: np.ndarray
    change: float
    per_class: dict[str, float]

    @property
    def success(self) -> float:
        return mean_seen(self.hit)

    @property
    def no_face(self) -> int:
        """Pictures in which the edit left no face."""
        return int(np.isnan(self.hit).sum())

    @property
    def in_words(self) -> str:
        """Success of all and by class."""
        return f"{self.success:.0%} ({', '.join(f'{name} {share:.0%}' for name, share in self.per_class.items())})"


@dataclass(frozen=True)
class Part:
    """The best `features` of a recipe, and as many random ones with an edit of the same norm (None without an SAE)."""

    features: int
    best: Outcome
    random: Outcome | None


def mean_seen(values: np.ndarray) -> float:
    """Mean of the pictures that count, those without NaN; 0 if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


Read = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Experiment:
    """The pictures that are steered: from noises `numbers` (n), each to class `target` (n), which it does not show.

    unsteered: the pictures of all noises as they are; probability: their class probabilities, as `seen`; labels: their
    classes, as `seen_classes`.
    """

    run: Run
    read: Read
    recipe: Recipe
    sae: SparseAutoencoder | None
    unsteered: Tensor
    probability: Tensor
    numbers: Tensor
    target: Tensor

    @classmethod
    def begin(cls, run: Run, read: Read, recipe: Recipe, sae: SparseAutoencoder | None, pictures: int) -> Experiment:
        """Draw the unsteered pictures and choose up to `pictures` for each class."""
        unsteered = run.draw(torch.arange(UNSTEERED * pictures), lambda rows: [])
        probability = seen(read(unsteered), recipe.attribute).cpu()
        labels = seen_classes(probability)
        known = labels != NO_CLASS
        others = [(known & (labels != c)).nonzero().flatten()[:pictures] for c in range(len(recipe.classes))]
        numbers = torch.cat(others)
        if len(numbers) < 2:
            raise DiffLensError(
                f"{recipe.attribute}: no face was found in the {len(unsteered)} unsteered pictures. Look at them, or "
                "set face_detector to none in Load Attribute Classifier."
            )
        target = torch.cat([torch.full_like(mine, c) for c, mine in enumerate(others)])
        return cls(run, read, recipe, sae, unsteered, probability, numbers, target)

    @property
    def labels(self) -> Tensor:
        return seen_classes(self.probability)

    def before(self) -> Outcome:
        """The pictures without steering: none shows the class that it will be asked for."""
        return self.outcome(self.probability[self.numbers], self.unsteered[self.numbers])

    def steered(self, recipe: Recipe) -> Outcome:
        """The same pictures, steered by `recipe`, without the SAE if it can."""
        sae = self.sae if recipe.needs_sae else None
        alone = with_settings(recipe, hold=False)  # what the latents do by themselves

        def edits(rows: Tensor) -> list[Steering]:
            return steerings(alone, lambda images: self.target[rows[images]], sae)

        after = self.run.draw(self.numbers, edits)
        return self.outcome(seen(self.read(after), recipe.attribute).cpu(), after)

    def outcome(self, probability: Tensor, after: Tensor) -> Outcome:
        own = probability.gather(1, self.target[:, None])[:, 0].double()
        hit = (seen_classes(probability) == self.target).double().where(~own.isnan(), torch.nan)
        per_class = {
            self.recipe.classes[c]: mean_seen(hit[self.target == c].numpy()) for c in self.target.unique().tolist()
        }
        change = pixel_change(self.unsteered[self.numbers].cpu().numpy(), after.cpu().numpy())
        return Outcome(own.numpy(), hit.numpy(), change, per_class)


def probe_score(recipe: Recipe) -> Tensor:
    """How much each latent speaks for each class (K x F) by the recipe's own levels and probes.

    The product in the contrastive score of Attribute Features, from what the recipe holds: it does not say by what it
    was ranked, and `member` says whose the latents are.
    """
    steps = zip(recipe.levels.dense().mean(dim=-1), recipe.probe_weight, strict=True)
    return sum((contrast(level) * contrast(weight @ recipe.decoder.T) for level, weight in steps), torch.zeros(()))


def ablation(
    experiment: Experiment, shares: Sequence[float], sae: SparseAutoencoder | None, whole: Outcome
) -> list[Part]:
    """Steering by the best features of every class alone, for each share of them, and by random ones if there is `sae`.

    whole: what all features do. The random sets lie in each other, as the best ones do.
    """
    recipe, found = experiment.recipe, []
    most = int(recipe.member.sum(dim=1).max())
    others = random_features(recipe, sae, seed=0).features if sae else None
    for share in shares:
        if share == 1:
            part, best = recipe, whole
        else:
            part = keep_best(recipe, probe_score(recipe), max(1, round(share * most)), "contrastive")
            best = experiment.steered(part)
        random = None
        if sae and others is not None:
            rows = torch.isin(recipe.features, part.features)
            random = experiment.steered(with_latents(part, sae, others[rows]))
        found.append(Part(len(part.features), best, random))
    return found


def paired_interval(difference: np.ndarray, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, over pictures, of a difference (n) between two edits of the same.

    Pictures with NaN do not count; with none left the interval is that of no knowledge, -1 to 1.
    """
    difference = difference[~np.isnan(difference)]
    if len(difference) == 0:
        return -1.0, 1.0
    rows = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[rows].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
