"""What a latent does to the pictures: change it alone while sampling, and see which class they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy import stats
from torch import Tensor

from ..activations import Draw
from ..files import DiffLensError
from ..locate import contrast
from ..steer import Recipe, Steering, check_one_site, of_latents
from .draw import readings

EFFECTS = ("amplify", "ablate")


@dataclass(frozen=True)
class OneLatent:
    """Edit of one latent of a recipe in each picture: `latent` holds its row in the recipe (B), -1 for none.

    ablate: z' = 0; amplify: z' = z + strength (level - mean of the other classes' levels), in the class that uses the
    latent most, per step and position.
    """

    recipe: Recipe
    latent: Tensor
    mode: str
    strength: float = 1.0

    @property
    def site(self) -> str:
        return self.recipe.site

    @cached_property
    def steering(self) -> Steering:
        """How the recipe reads and writes."""
        return Steering(self.recipe, torch.Tensor.long)

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        latent = self.latent[images].clamp(min=0)
        if not self.steering.acts(progress):
            return h
        self.steering.check(h)
        edit = self.steering.sized(h) if self.steering.stretch(h) else self.steering
        recipe, t, step = edit.recipe, edit.tensors(h.device), edit.recipe.normalisation.step_at(progress)
        frames, own = edit.frames(h, step, t), torch.arange(len(latent))
        if self.mode == "ablate":
            amount = -edit.read(edit.columns(h, frames), step, t)[own, latent.to(h.device)]
        else:
            levels = recipe.levels.some(latent).dense()  # S x K x B x P
            strongest = levels.mean(dim=(0, 3)).argmax(dim=0)
            amount = self.strength * contrast(levels[step])[strongest, own].to(h.device)
        amount = amount * (self.latent[images] >= 0).to(h.device)[:, None]
        decoder = recipe.decoder[latent].to(h.device)
        change = t["scale"][step] * decoder[:, :, None] * amount[:, None]
        return h + edit.laid(change, h, frames).to(h.dtype)


@dataclass(frozen=True)
class Effects:
    """What changing each latent of a recipe does: F latents, K classes, `pictures` paired pictures each.

    effect: F x K, mean change of the probability of each class; margin: F x K, half of its 95 % interval over the
    pictures, by Student's t; mode: how the latents were changed; uncounted: pairs of all F x `pictures` in which a
    face is missing, which do not count. A latent with fewer than two pairs left has effect 0 and margin 1: nothing is
    known.
    """

    features: Tensor
    effect: Tensor
    margin: Tensor
    mode: str
    pictures: int
    uncounted: int = 0

    @property
    def carried(self) -> Tensor:
        """How much each latent speaks for each class (F x K): the effect of amplifying, or of not ablating it."""
        return -self.effect if self.mode == "ablate" else self.effect

    @property
    def stands_for(self) -> Tensor:
        """The class that each latent carries most (F)."""
        return self.carried.argmax(dim=1)


def causal_effect(
    recipe: Recipe,
    draw: Draw,
    classify: Callable[[Tensor], Tensor],
    pictures: int = 16,
    mode: str = "amplify",
    strength: float = 1.0,
    batch: int = 32,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    on_found: Callable[[Effects], None] = lambda effects: None,
) -> Effects:
    """Change each latent of `recipe` alone while `draw` samples the same `pictures` noises, and read the class.

    classify(images) gives the attribute's class probabilities (B x K), as `seen`. Pictures are paired by their noise,
    so that the interval is that of the difference. All latents and noises form one long run, cut into batches of
    `batch`, whatever latent they belong to. on_picture(done, total) may raise to cancel. on_found is told the effects
    of the latents that are read so far.
    """
    check_one_site(recipe, "Rank by Effect")
    if mode not in EFFECTS:
        raise DiffLensError(f"causal effect: mode {mode!r} is unknown, expected one of {', '.join(EFFECTS)}.")
    if pictures < 2:
        raise DiffLensError(f"causal effect: {pictures} pictures per feature, expected at least 2.")
    if not recipe.levels.positions if mode == "amplify" else recipe.needs_sae:
        raise DiffLensError(
            f"causal effect: to {mode} its features, the recipe for {recipe.attribute} needs "
            f"{'class levels' if mode == 'amplify' else 'thresholds'}, which one from feature files lacks. "
            "Use a recipe from Attribute Features."
        )
    jobs = torch.arange((len(recipe.features) + 1) * pictures)  # the first `pictures` are left as they are
    batches = (
        ([OneLatent(recipe, job // pictures - 1, mode, strength)], job % pictures) for job in jobs.split(batch)
    )  # fmt: skip
    read = torch.zeros(0, len(recipe.classes))
    for found in readings(draw, batches, classify, lambda done: on_picture(done, len(jobs))):
        known, read = len(read) // pictures, torch.cat([read, found.float().cpu()])
        if len(read) // pictures > max(known, 1):
            effects = effects_of(recipe.features, read, mode, pictures)
            on_found(effects)
    return effects


def effects_of(features: Tensor, read: Tensor, mode: str, pictures: int) -> Effects:
    """The effects of the first latents from the class probabilities `read` (n x K): first those of the `pictures` that
    were left as they are, then as many of each latent, of which the last may lack some.
    """
    probability = read[: len(read) // pictures * pictures].unflatten(0, (-1, pictures))
    if int((~probability[0].isnan().any(dim=1)).sum()) < 2:
        raise DiffLensError(
            f"causal effect: fewer than two of {pictures} unsteered pictures show a face. Draw more pictures, look at "
            "them, or set face_detector to none in Load Attribute Classifier."
        )
    change = probability[1:] - probability[0]
    counted = ~change.isnan().any(dim=2)  # F x pictures
    n = counted.sum(dim=1)[:, None].clamp(min=1)
    change = change.where(counted[:, :, None], 0.0)
    effect = change.sum(dim=1) / n
    spread = ((change - effect[:, None]) * counted[:, :, None]).square().sum(dim=1) / (n - 1).clamp(min=1)
    enough = counted.sum(dim=1)[:, None] >= 2
    quantile = torch.from_numpy(stats.t.ppf(0.975, (n - 1).clamp(min=1).numpy())).float()
    effect, margin = effect.where(enough, 0.0), (quantile * (spread / n).sqrt()).where(enough, 1.0)
    return Effects(features[: len(effect)], effect, margin, mode, pictures, int((~counted).sum()))


def keep_effective(recipe: Recipe, effects: Effects, count: int) -> Recipe:
    """The recipe with, of every class's latents, only the `count` that carry the class most by their effect."""
    return keep_best(recipe, effects.carried.T, count, f"{effects.mode}, {effects.pictures} pictures a feature")


def keep_best(recipe: Recipe, score: Tensor, count: int, ranking: str) -> Recipe:
    """The recipe with, of every class's latents, only the `count` of the highest score (K x F).

    ranking: what the score is, for the recipe's info.
    """
    score = score.masked_fill(~recipe.member, -torch.inf)
    best = score.topk(min(count, score.shape[1]), dim=1)
    member = torch.zeros_like(recipe.member).scatter_(1, best.indices, best.values > -torch.inf)
    kept = member.any(dim=0)
    found = of_latents(replace(recipe, member=member, weight=None), kept)
    return replace(found, info={**found.info, "ranking": ranking, "scores": score.amax(dim=0)[kept].tolist()})
