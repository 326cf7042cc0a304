"""The steps by which a family of small portrait models is made, whatever it draws by."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from precision import autocast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from difflens_core.activations import Activations
from difflens_core.classifiers import AttributeClassifier, FramedClassifier
from difflens_core.locate import Labelled, LabelledPictures, Probes, attribute_features, balancing_weights, train_probes
from difflens_core.sae import (
    SparseAutoencoder,
    TrainingOptions,
    hold_out,
    learning_rate_share,
    load_sae,
    measure_sae,
    train_sae,
)
from difflens_core.steer import Recipe, build_recipe, load_recipe, mean_difference, random_features, with_settings

Options = Mapping[str, Any]
Drawings = tuple[np.ndarray, Mapping[str, np.ndarray]]  # uint8 n x H x W x 3, and traits by name


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 B x H x W x 3 to float B x 3 x H x W in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def denoiser_loss(
    predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, counts_more: Tensor | float = 0.0, shift: float = 1.0
) -> Tensor:
    """Clean-picture loss of `predict(noisy, sigma)` under x_t = (1 - sigma) x0 + sigma noise.

    sigma is uniform; a `shift` over 1 draws more of the high ones, at which is decided what stands where.

    The weight 1 / (sigma^2 + 0.02) lies between the x0 loss and the velocity loss, so that details count.
    counts_more: how much more each pixel counts (B x 1 x H x W), the less the more noise there is: what is drawn out of
    nothing is not to depend on it.
    """
    u = torch.rand(len(x0))
    sigma = shift * u / (1 + (shift - 1) * u)
    s = sigma[:, None, None, None]
    noisy = (1 - s) * x0 + s * torch.randn_like(x0)
    with autocast(), sdpa_kernel(SDPBackend.MATH):  # attention over few positions: the whole step is a tenth faster
        predicted = predict(noisy, sigma)
    error = ((predicted.float() - x0).square() * (1 + (1 - s) * counts_more)).mean(dim=(1, 2, 3))
    return (error / (sigma.square() + 0.02)).mean()


def train_network(model: nn.Module, loss_at: Callable[[int], Tensor], c: Options, checkpoint: Path) -> nn.Module:
    """Train `model` by the options `c`; loss_at(step) draws a batch. Returns the average of its weights (EMA)."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "ema": ema, "optimiser": optimiser}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    began, running = time.time(), 0.0
    for step in range(start, c["steps"]):
        torch.manual_seed(c["seed"] * 1_000_003 + step)  # a resumed run sees the same batches and noise
        for group in optimiser.param_groups:
            group["lr"] = c["lr"] * learning_rate_share(step, c["steps"])
        loss = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(c["ema"], (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - start) / (time.time() - began)
            print(f"denoiser {step + 1}/{c['steps']} loss {running:.4f} {speed:.2f} steps/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == c["steps"]:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return ema


def augment(x: Tensor, shift: int = 2) -> Tensor:
    """Shift by up to so many pixels, blur some, add noise: generated pictures are less crisp than drawings."""
    dx, dy = torch.randint(-shift, shift + 1, (2,)).tolist()
    x = x.roll((dy, dx), dims=(2, 3))
    blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1))
    return x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def fit_classifier(draw: Callable[[int, int], Drawings], heads: Mapping[str, tuple[str, ...]], c: Options) -> tuple:
    """Classifier of `heads` on balanced drawings in which no attribute gives another away, and its accuracies.

    draw(count, seed) gives such drawings.
    """
    torch.manual_seed(c["seed"])
    images, traits = draw(c["images"], c["seed"])
    labels = {name: torch.from_numpy(traits[name]) for name in heads}
    model = AttributeClassifier(heads)

    def loss_at(step: int) -> Tensor:
        picks = torch.randint(len(images), (c["batch"],))
        with autocast():
            logits = model(augment(to_tensor(images[picks.numpy()])))
        return attributes_loss(logits, {name: of[picks] for name, of in labels.items()})

    fit_readers(model, loss_at, c)
    accuracy = accuracies(model, *draw(c["test_images"], c["seed"] + 1), heads)
    print("classifier accuracy on balanced held-out drawings:", accuracy, flush=True)
    return model, accuracy


def attributes_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of all attributes."""
    return torch.stack([F.cross_entropy(logits[name].float(), labels[name]) for name in labels]).sum()


def fit_readers(model: nn.Module, loss_at: Callable[[int], Tensor], c: Options) -> None:
    """Train by the loss of each step over the epochs of the options `c`, and leave in evaluation mode."""
    steps = c["epochs"] * (c["images"] // c["batch"])
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, c["lr"], total_steps=steps)
    for step in range(steps):
        loss = loss_at(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"classifier {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    model.eval()


def accuracies(
    model: AttributeClassifier | FramedClassifier, images: np.ndarray, traits: Mapping[str, np.ndarray],
    heads: Iterable[str],
) -> dict[str, float]:  # fmt: skip
    """Share of drawings whose class is told, for each attribute."""
    read = model.classify(torch.from_numpy(images).float() / 255)
    return {name: float((read[name].argmax(1).numpy() == traits[name]).mean()) for name in heads}


def fit_sae(activations: Activations, c: Options, checkpoint: Path) -> SparseAutoencoder:
    """SAE on the activations of sampled pictures; an eighth of the pictures is held out to measure it."""
    train, held_out = hold_out(activations)
    options = TrainingOptions(**{name: c[name] for name in ("latents", "k", "steps", "seed")})

    def report(step: int, loss: Tensor, _: object) -> None:
        if step % 100 == 0:
            print(f"SAE {step}/{options.steps} loss {float(loss):.4f}", flush=True)

    sae = train_sae(train, options, report, checkpoint)
    quality = asdict(measure_sae(sae, held_out))
    print("SAE on held-out pictures:", quality, flush=True)
    return replace(sae, info={**sae.info, "held_out": quality})


def read_attributes(classifier: AttributeClassifier, pictures: Tensor) -> dict[str, Tensor]:
    """Class (n, int64) that the classifier sees in pictures (n x H x W x 3), for each of its attributes."""
    return {name: values.argmax(dim=1) for name, values in readings_of(classifier, pictures).items()}


def readings_of(classifier: AttributeClassifier | FramedClassifier, pictures: Tensor) -> dict[str, Tensor]:
    """How probable each class of every attribute is (n x K), of as many pictures as there are."""
    parts = [classifier.classify(part) for part in pictures.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_all(
    classifier: AttributeClassifier | FramedClassifier, activations: Activations, pictures: Tensor
) -> Captured:
    """What the classifier sees in the pictures that were drawn while activations were captured."""
    readings = readings_of(classifier, pictures)
    labels = {name: (classifier.attributes[name], values.argmax(dim=1)) for name, values in readings.items()}
    return Captured(activations, labels, readings)


class Captured(NamedTuple):
    """Activations, and of every attribute the classes that their pictures show and how probable each is (n x K)."""

    activations: Activations
    labels: Labelled
    readings: Mapping[str, Tensor]

    def of(self, attribute: str) -> LabelledPictures:
        """What an attribute's recipe is made of."""
        others = {name: labels for name, labels in self.labels.items() if name != attribute}
        return LabelledPictures(self.activations, self.labels[attribute][1], others, self.readings)


# Samples pictures under a recipe: which class each shows, and which it was asked to show (n, int64).
TryOut = Callable[[Recipe], tuple[Tensor, Tensor]]


def make_recipe(
    attribute: str, classes: tuple[str, ...], captured: Sequence[Captured], sae: SparseAutoencoder, fingerprint: str,
    c: Options, try_out: TryOut, weigh: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> tuple[Recipe, Probes]:  # fmt: skip
    """Recipe of an attribute and its probes.

    Latents are chosen by what was captured first; its latents are weighed by `weigh`, and then its strengths found by
    `try_out`.
    """
    first, *more = (of.of(attribute) for of in captured)
    activations, labels, others = first.activations, first.labels, first.others
    probes = train_probes(activations, sae, labels, attribute, classes)
    weights = balancing_weights(labels, [other for _, other in others.values()])
    attribution = attribute_features(activations, sae, probes, labels, weights=weights)
    recipe = build_recipe(
        attribution, sae, probes, activations, labels, others, c["per_class"], fingerprint, readings=first.readings,
        more=more,
    )  # fmt: skip
    recipe = tuned(weigh(with_settings(recipe, start=c["start"], mode=c["modes"][attribute])), c, try_out)
    print(f"{attribute} weighed: {recipe.info.get('weighed')}", flush=True)
    return recipe, probes


def compared(
    recipes: Mapping[str, Path], sae: Path, labelled: Callable[[], Sequence[Captured]], controlled: bool
) -> dict[str, dict[str, Recipe]]:
    """The recipe in each attribute's file and, if asked, as many random latents and no SAE at all, by name.

    labelled: gives what the latter need, which takes minutes.
    """
    found = {attribute: {"SAE recipe": load_recipe(file)} for attribute, file in recipes.items()}
    if controlled:
        loaded, captured = load_sae(sae), labelled()
        for attribute, own in found.items():
            recipe = own["SAE recipe"]
            own["random features"] = random_features(recipe, loaded, seed=1)
            own["mean difference"] = mean_difference(recipe, [of.of(attribute) for of in captured])
    return found


def tuned(recipe: Recipe, c: Options, try_out: TryOut) -> Recipe:
    """The recipe at the weakest strength, class by class, that shows the class asked for often enough."""
    success, strengths = [], c["strengths"][recipe.mode]
    for strength in strengths:
        shown, asked = try_out(with_settings(recipe, strength=strength))
        success.append([float((shown[asked == k] == k).double().mean()) for k in range(len(recipe.classes))])
        print(f"{recipe.attribute} strength {strength}: {success[-1]}", flush=True)
    table = torch.tensor(success, dtype=torch.float64)
    enough = table >= table.amax(dim=0).clamp(max=c["success"])
    first = enough.int().argmax(dim=0).tolist()
    chosen = tuple(strengths[index] for index in first)
    figures = {"success": [success[index][k] for k, index in enumerate(first)], "tuned_on": dict(c)}
    return replace(recipe, strength=chosen, info={**recipe.info, **figures})


def recipe_rows(recipes: Iterable[Recipe]) -> str:
    """The recipes as rows of a model card's table."""
    rows = []
    for recipe in recipes:
        strengths = ", ".join(f"{name} {s:g}" for name, s in zip(recipe.classes, recipe.strength, strict=True))
        how = f"{recipe.mode} | {recipe.start:.0%} | {strengths}"
        agreement = recipe.info["gate_agreement"]
        rows.append(f"| {recipe.attribute} | {len(recipe.features)} | {how} | {agreement:.3f} |")
    return "\n".join(rows)


def build(stages: dict[str, tuple[Callable[[], None], Path]], work: Path, about: str) -> None:
    """The command line: run the stages asked for by name, or all those whose result is not there yet."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"made again though its files are there: {', '.join(stages)}")
    asked = parser.parse_args().stage
    unknown = sorted(set(asked) - set(stages))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(stages)}")
    torch.set_flush_denormal(True)  # tiny Adam moments would slow the CPU many times over
    work.mkdir(parents=True, exist_ok=True)
    for name, (make, result) in stages.items():
        if name in asked or (not asked and not result.exists()):
            make()
        elif not asked:
            print(f"{name}: {result} is there already")
