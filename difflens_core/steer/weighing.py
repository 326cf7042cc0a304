"""How much of its change each latent of a recipe makes: so that the attribute moves as before, and others less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..activations import Sampler, slopes_in_frames
from ..classifiers import (
    NO_CLASS,
    DifferentiableClassifier,
    ImageClassifier,
    decided,
    other_attributes,
    seen,
    seen_classes,
)  # fmt: skip
from ..files import DiffLensError, load_tensors, reading, save_tensors
from ..locate import tied
from .recipes import Recipe
from .steering import BY_LEVELS, Steering

EVERY = 2  # of the steps in the recipe's part of the sampling are looked at
# What changes to the others, to the picture and to the attribute cost, beside that of weights themselves.
SPARE, PICTURE, KEEP = 30.0, 30.0, 300.0


@dataclass
class Products:
    """Sums over pictures and steps that tell what an edit with weights w (F) does, each as a product w^T M w.

    The squared effects on the picture's pixels, on the log-odds of the attribute (own) and on those of all others.
    """

    picture: Tensor
    own: Tensor
    others: Tensor

    @classmethod
    def none(cls, latents: int) -> Products:
        """Of no pictures."""
        return cls(*torch.zeros(3, latents, latents, dtype=torch.float64))

    def add(self, change: Tensor, decoder: Tensor, gradients: Tensor) -> None:
        """Add pictures at a step.

        change: B x F x P, of their latents; decoder: F x width; gradients: 3 x B x width x P, of the picture, of the
        attribute and of the others.
        """
        effects = (torch.einsum("ebwp,fw->ebfp", gradients, decoder) * change).sum(dim=3)
        picture, own, others = torch.einsum("ebf,ebg->efg", effects, effects).double().cpu()
        self.picture = self.picture + picture  # not in place: a host may have begun them in inference mode
        self.own, self.others = self.own + own, self.others + others

    def __add__(self, other: Products) -> Products:
        return Products(self.picture + other.picture, self.own + other.own, self.others + other.others)

    def shares(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three over their values at w = 1."""
        return tuple(m / m.sum().clamp(min=1e-30) for m in (self.picture, self.own, self.others))  # type: ignore[return-value]

    def solve(self) -> Tensor:
        """The weights (F) nearest to 1 that keep the picture and the effect on the attribute, and spare the others.

        The minimum of mean((w - 1)^2) + PICTURE picture(w - 1) + KEEP own(w - 1) + SPARE others(w): linear, as all are
        quadratic. Latents that never change stay at 1.
        """
        picture, own, others = self.shares()
        near = PICTURE * picture + KEEP * own + torch.eye(len(own), dtype=torch.float64) / len(own)
        return torch.linalg.solve(near + SPARE * others, near.sum(dim=1)).float()

    def left(self, weight: Tensor) -> dict[str, float]:
        """Effects of the edit under such weights (F), root mean squares, where 1 is without them."""
        w = weight.double()
        names = ("picture", "own", "others")
        return {name: float((w @ m @ w).sqrt()) for name, m in zip(names, self.shares(), strict=True)}


def nothing_to_spare(recipe: Recipe, classifier: ImageClassifier) -> str:
    """Why the latents cannot be weighed, or ""."""
    if recipe.further:
        return f"the recipe is of {len(recipe.sites)} sites"
    if recipe.mode not in BY_LEVELS:
        return f"mode {recipe.mode} does not go by levels"
    if not hasattr(classifier, "log_probabilities"):
        return "the classifier does not tell how a picture would have to change to be read otherwise"
    if not other_attributes(classifier.attributes, recipe.attribute):
        return f"the classifier reads nothing but {recipe.attribute}"
    return ""


def read_weights(file: Path, recipe: Recipe) -> Recipe:
    """The recipe with the weights that `weigh_latents` kept. Raises `DiffLensError` if they are another's."""
    found, info = load_tensors(file, "weights", ("weight", "weighed"))
    with reading(file):
        if found["weight"].shape != recipe.features.shape:
            raise DiffLensError(f"it does not hold {len(recipe.features)} weights. Delete the file.")
        return with_figures(replace(recipe, weight=found["weight"].float()), dict(info["weighed"]))


def weigh_latents(
    recipe: Recipe,
    sampler: Sampler,
    classifier: ImageClassifier,
    noise: Tensor,
    batch: int = 32,
    on_batch: Callable[[int], None] = lambda done: None,
    file: Path | None = None,
) -> Recipe:
    """The recipe with a weight for each latent under which it moves its attribute as before and the others least.

    Each of `noise` (n x shape) is drawn twice without steering: first to see what it shows, then to differentiate. At
    every other step the classifier reads the finished picture that the network predicts. By the gradient of its
    log-odds with respect to the site, a latent that goes from the level of the picture's class to that of another
    adds, to the first order, J[a, f] = sum over positions of change[f] <D_f, gradient_a>; `Products` says what is
    solved. The other attributes need one gradient in all, and so do the pixels: with signs drawn at random for each
    of them the square of the sum is the sum of squares on average.

    What comes with the class, such as a beard, is left out: attributes that are `tied` to it in the pictures that the
    recipe was made on, or, if it does not tell, in these. The result does not depend on the batch. Where there is
    nothing to go by, the recipe stays as it is, and its info["weighed"] tells why. What was found is kept in `file`,
    and read from there the next time.
    """
    if why := nothing_to_spare(recipe, classifier):
        return with_figures(recipe, {"why": why})
    if file and file.exists():
        return read_weights(file, recipe)
    labels = read_classes(sampler, classifier, noise, batch, on_batch)
    own = labels[recipe.attribute]
    others = other_attributes(classifier.attributes, recipe.attribute)
    left_out = recipe.info.get("tied", [name for name in others if tied(own, labels[name])])
    spared = [name for name in others if name not in left_out]
    if not spared or len(own[own != NO_CLASS].unique()) < 2:
        why = "all show one class" if spared else "every other attribute comes with the class"
        return with_figures(recipe, {"why": f"among {len(noise)} pictures {why}"})
    steering = Steering(replace(recipe, weight=None), torch.Tensor.long)
    steps = [s for s, at in enumerate(sampler.progress) if steering.acts(at)][::EVERY]
    halves = [Products.none(len(recipe.features)) for _ in range(2)]

    def look(images: Tensor, step: int, h: Tensor, pictures: Tensor) -> None:
        told = cast(DifferentiableClassifier, classifier).log_probabilities(pictures)
        known = {name: (labels[name][images] != NO_CLASS) & decided(told).cpu() for name in (recipe.attribute, *spared)}
        odds = {name: log_odds(told[name], labels[name][images]) * known[name].to(told[name]) for name in known}
        others = torch.stack([odds[name] for name in spared], dim=1)
        sums = (
            (pictures * random_signs(images, step, pictures)).sum(),
            odds[recipe.attribute].sum(),
            (others * random_signs(images, step, others)).sum(),
        )
        gradients = torch.stack([torch.autograd.grad(value, h, retain_graph=True)[0] for value in sums])
        with torch.no_grad():
            for half, products in enumerate(halves):
                mine = images % 2 == half
                part = h.detach()[mine], own[images[mine]], gradients[:, mine]
                add(products, steering, sampler.progress[step], *part)

    for images in torch.arange(len(noise)).split(batch):
        sampler.predict(noise[images], images, recipe.site, steps, partial(look, images))
        on_batch(len(noise) + int(images[-1]) + 1)
    weight = (halves[0] + halves[1]).solve()
    figures = {"pictures": len(noise), "spared": spared, **left_elsewhere(*halves)}
    if file:
        save_tensors(file, "weights", {"weight": weight}, {"weighed": figures})
    return with_figures(replace(recipe, weight=weight), figures)


def left_elsewhere(one: Products, other: Products) -> dict[str, float]:
    """What `Products.left` tells of weights on other pictures than they were found on, by both halves."""
    there, back = other.left(one.solve()), one.left(other.solve())
    return {name: (there[name] + back[name]) / 2 for name in there}


def with_figures(recipe: Recipe, weighed: Mapping[str, object]) -> Recipe:
    """The recipe with what its info["weighed"] is to tell."""
    return replace(recipe, info={**recipe.info, "weighed": dict(weighed)})


def read_classes(
    sampler: Sampler, classifier: ImageClassifier, noise: Tensor, batch: int, on_batch: Callable[[int], None]
) -> Mapping[str, Tensor]:
    """Which class of each attribute (n, int64, or NO_CLASS) the unsteered pictures show."""
    latents = []
    for images in torch.arange(len(noise)).split(batch):
        latents.append(sampler.sample(noise[images], images))
        on_batch(int(images[-1]) + 1)
    read = (classifier.classify(sampler.decode(of)) for of in latents)
    parts = [{name: seen_classes(seen(of, name)) for name in classifier.attributes} for of in read]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def random_signs(images: Tensor, step: int, like: Tensor) -> Tensor:
    """1 or -1 for each element of `like`, whose rows are the images: the same whatever else is in the batch."""
    seeds = [torch.Generator().manual_seed(1000 * image + step) for image in images.tolist()]
    drawn = torch.stack([torch.randint(0, 2, like.shape[1:], generator=seed) for seed in seeds])
    return (2 * drawn - 1).to(like)


def log_odds(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """log p - log (1 - p) of each row's class (B, NO_CLASS as the first): B, exact where p rounds to 1."""
    own = classes.clamp(min=0).to(log_probabilities.device)[:, None]
    rest = log_probabilities.scatter(1, own, -torch.inf).logsumexp(dim=1)
    return log_probabilities.gather(1, own)[:, 0] - rest


def add(
    products: Products, steering: Steering, progress: float, h: Tensor, own: Tensor, gradients: Tensor
) -> None:  # fmt: skip
    """Add pictures of classes `own` (B) to the products: at this progress, asked for each of the other classes.

    h: B x C x H x W, what the site puts out; gradients: 3 x B x C x H x W.
    """
    known, own = (own != NO_CLASS).to(h.device), own.clamp(min=0).to(h.device)
    edit = steering.sized(h) if steering.stretch(h) else steering
    recipe, t, step = edit.recipe, edit.tensors(h.device), edit.recipe.normalisation.step_at(progress)
    frames = edit.frames(h, step, t)
    traits = edit.traits(h, step, t, frames)
    slopes = [part.float() if frames is None else slopes_in_frames(part.float(), frames) for part in gradients]
    by_column = torch.stack([recipe.columns(part) for part in slopes])
    start = edit.level(own, traits, step)
    for target in range(len(recipe.classes)):
        asked = ((own != target) & known)[:, None, None]
        change = edit.level(torch.full_like(own, target), traits, step) - start
        products.add(asked * change, t["scale"][step] * t["decoder"], by_column)
