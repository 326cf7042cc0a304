"""Can an edit be read off the picture, position by position? Fairness of people in scenes, beside the shipped recipe.

    python benchmarks/pairs.py                     about 12 minutes on 2 cores
    python benchmarks/pairs.py --attribute age --pictures 32 --grids FOLDER

Recipes lay the difference of two classes over the figure's frame. Here no place is known. Pictures are drawn in pairs:
from the same noise, by prompts that differ in one word. Where both show the class asked for and all else alike, one
ridge regression tells what the site puts out in the second picture more than in the first, at every step and position,
by the SAE's latents that fire at this position when the first one is finished. Every position of a picture is changed
by that, times a strength. Pairs are of two sizes, and serve four. No recipe for age is shipped, so age has nothing
beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from debias import STEPS, Read, draw_all, outcome, run, to_images
from make_scenes import CFG, CLASSIFIER_FILE, DENOISER_FILE, RECIPES, SAE_FILE, everywhere
from occupations import OCCUPATIONS
from precision import PRECISION, at_precision
from prompted_portraits import phrase
from scene_tables import figures, heading, row, save_grid, shown_beside
from scenes import ATTRIBUTES, SIZES, layouts
from stages import read_attributes
from torch import Tensor
from torch.nn import functional as F

from difflens_core.activations import Activations, Shown, capture
from difflens_core.classifiers import FramedClassifier, load_classifier
from difflens_core.locate import latent_rows
from difflens_core.locate.probes import fit_logistic
from difflens_core.networks import Denoiser, DenoiserSampler, Guidance, TextEncoder, load_prompted, start_noise
from difflens_core.sae import SparseAutoencoder, load_sae
from difflens_core.steer import load_recipe
from difflens_core.targets import Targets, parse_target

WORDS = {"presentation": ("male", "female"), "age": ("young", "adult", "old")}
BESIDE = {
    word: ("", *WORDS[other])
    for name, other in (("presentation", "age"), ("age", "presentation"))
    for word in WORDS[name]
}  # what prompts tell in turn beside a word
COMES_WITH = {"age": ("hair_colour",)}  # what pairs may differ in as well: seniors are grey
CAPTURED, SEED, FRESH = ((96, 64), (64, 96)), 9_100, 97_001
START, SHRINKAGE = 0.2, 30.0


@dataclass(frozen=True)
class Drawn:
    """What the site puts out while pictures are drawn by prompts with one of the words, and what they show."""

    activations: Activations
    seen: Mapping[str, Tensor]


def drawn(
    model: Denoiser, text: TextEncoder, classifier: FramedClassifier, word: str, count: int, size: tuple[int, int]
) -> Drawn:
    """Pictures of every occupation at every place, of the same noise whatever the word."""
    told = list(product(BESIDE[word], OCCUPATIONS))
    endings = layouts(size)
    prompts = [
        phrase(sorted(filter(None, (word, beside)), key=[*WORDS["age"], *WORDS["presentation"]].index), job)
        + endings[(i + i // len(told)) % len(endings)]
        for i, (beside, job) in zip(range(count), cycle(told), strict=False)
    ]
    sampler = DenoiserSampler(model, STEPS, Guidance(text.encode(prompts), text.encode([""]), CFG), size)
    store = capture(sampler, count, SEED + size[0], span=(START, 1.0))
    return Drawn(store.activations(), read_attributes(classifier, to_images(store.samples())))


def firing(sae: SparseAutoencoder, h: Tensor) -> Tensor:
    """Activity of all latents at the h (B x C x H x W) of finished pictures, and a one: B x P x N + 1."""
    latents, _ = latent_rows(sae, torch.arange(sae.latents))(h, sae.normalisation.step_at(1 - 1 / STEPS))
    return F.pad(latents.transpose(1, 2), (0, 1), value=1.0)


def fit_changes(sizes: list[list[Drawn]], sae: SparseAutoencoder, attribute: str, own: int, asked: int) -> Tensor:
    """S x N + 1 x C: what each latent of a finished picture of class `own` tells of the change to `asked`."""
    alike = [name for name in ATTRIBUTES if name not in (attribute, *COMES_WITH.get(attribute, ()))]
    products, sums, count = torch.zeros(()), torch.zeros(()), 0
    for of_words in sizes:
        for first in of_words:
            for second in of_words:
                same = torch.stack([first.seen[name] == second.seen[name] for name in alike]).all(dim=0)
                pairs = same & (first.seen[attribute] == own) & (second.seen[attribute] == asked)
                before, after = (of.activations.values[:, pairs].float() for of in (first, second))
                x = firing(sae, before[-1]).flatten(0, 1)
                change = (after - before).movedim(2, -1).flatten(1, 3)
                products, count = products + (x.T @ x).double(), count + int(pairs.sum())
                sums = sums + torch.einsum("rn,src->snc", x, change).double()
    print(f"{ATTRIBUTES[attribute][own]} to {ATTRIBUTES[attribute][asked]}: {count} pairs", flush=True)
    return torch.linalg.solve(products + SHRINKAGE * torch.eye(len(products)).double(), sums).float()


@dataclass(frozen=True)
class Change:
    """An edit that holds: the change of every position, told by the unsteered picture."""

    by_classes: Mapping[tuple[int, int], Tensor]
    own: tuple[Tensor, Tensor]
    sae: SparseAutoencoder
    targets: Targets
    strength: float
    site: str = "middle_block"
    holds: bool = True

    def acts(self, progress: float) -> bool:
        return round(progress, 6) >= START

    def __call__(self, h: Tensor, progress: float, images: Tensor, shown: Shown | None = None) -> Tensor:
        if shown is None or not self.acts(progress):
            return h
        step, edited = round((progress - START) * STEPS), h.float()
        x = firing(self.sae, shown.h.float())
        shows, asked = F.linear(shown.h.float().mean(dim=(2, 3)), *self.own).argmax(dim=1), self.targets.of(images)
        for (own, wanted), weight in self.by_classes.items():
            turns = (shows == own) & (asked == wanted)
            change = (x[turns] @ weight[step]).transpose(1, 2).unflatten(2, h.shape[2:])
            edited = edited.index_add(0, turns.nonzero().flatten(), self.strength * change)
        return edited.to(h.dtype)


def fitted(sizes: list[list[Drawn]], sae: SparseAutoencoder, attribute: str) -> dict[str, Any]:
    """The changes between classes, and a logistic regression that tells a finished picture's own class."""
    classes = range(len(ATTRIBUTES[attribute]))
    pairs = [(own, asked) for own in classes for asked in classes if own != asked]
    everything = [of for of_words in sizes for of in of_words]
    x = torch.cat([of.activations.values[-1].float().mean(dim=(2, 3)) for of in everything])
    labels = torch.cat([of.seen[attribute] for of in everything])
    changes = {pair: fit_changes(sizes, sae, attribute, *pair) for pair in pairs}
    return {"by_classes": changes, "own": fit_logistic(x, labels, len(classes), 1e-3), "sae": sae}


def compare(
    model: Denoiser, classifier: FramedClassifier, change: Mapping[str, Any], job: str, guidance: Guidance,
    size: tuple[int, int], seed: int, options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pictures of a prompt and size, steered by the change and by the shipped recipe, measured and printed."""
    attribute, count = options.attribute, options.pictures
    classes, shown = ATTRIBUTES[attribute], shown_beside(attribute)
    targets = Targets(attribute, classes, tuple(parse_target("uniform", classes)), seed)
    edit = Change(**change, targets=targets, strength=options.strength)
    before = Read.of(run(model, count, None, seed, guidance, size)[0], classifier)
    ways = {"read off": to_images(draw_all(model, start_noise(count, seed, *size), [edit], guidance))}
    if (shipped := RECIPES / f"scenes_{attribute}.safetensors").exists():
        ways["recipe"] = run(model, count, load_recipe(shipped), seed, guidance, size)[0]
    rows = []
    print(f"\n{job}, {size[0]} x {size[1]}, {attribute}\n{heading(shown)}")
    for way, pictures in ways.items():
        found = outcome(classes, before, Read.of(pictures, classifier), attribute, targets)
        print(row(way, found, shown), flush=True)
        rows.append(figures(way, job, size, attribute, found))
    if options.grids:
        save_grid(options.grids / f"{job}_{size[0]}x{size[1]}_{attribute}.png", {"before": before.pictures, **ways})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attribute", choices=WORDS, default="presentation")
    parser.add_argument("--captured", type=int, default=384, help="pictures of a word and size")
    parser.add_argument("--pictures", type=int, default=32, help="pictures of a prompt and size")
    parser.add_argument("--prompts", nargs="+", default=["doctor", "nurse"])
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--grids", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, rows, count, attribute = time.time(), list[dict[str, Any]](), options.pictures, options.attribute
    model, text = load_prompted(DENOISER_FILE)
    model, classifier, sae = at_precision(model), load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE)
    print(f"n = {count} a prompt and size, cfg {CFG:g}, seeds from {FRESH}, {PRECISION}; shares in %", flush=True)
    sizes = [
        [drawn(model, text, classifier, word, options.captured, size) for word in WORDS[attribute]]
        for size in CAPTURED
    ]  # fmt: skip
    change = fitted(sizes, sae, attribute)
    for number, job in enumerate(options.prompts):
        for size in SIZES:
            guidance = everywhere(text, phrase([], job), size, count)
            rows += compare(model, classifier, change, job, guidance, size, FRESH + number, options)
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
