"""Ways to debias a prompt side by side, at the same success: the weakest strength of each that reaches it.

    python benchmarks/compare.py                    doctors and nurses, at least 64 changed pictures a row
    python benchmarks/compare.py --pictures 256 --prompts doctor nurse firefighter receptionist
    python benchmarks/compare.py --grids FOLDER --json FILE

Every class gets equally many pictures, and as few as possible change: what the classifier sees in the unsteered
pictures decides which (`plan_moves`), the same for all ways. All figures are of the pictures that are to change.

For every way, prompt and attribute the weakest of its strengths that reaches a success of .95, and of .99, is found
on seeds of its own. At these strengths other pictures are drawn, from seeds on which nothing was chosen. A way that
reaches it at none of its strengths is shown at its most successful one, marked with !.

Sampled with guidance (cfg 2), 20 steps. `SAE recipe` and `mean difference` are the shipped files (see `debias.py`), at
multiples of the recipe's strength; *in one go* is the same without holding on to the unsteered pictures, *all alike*
without weighing what each latent, or channel, does. `random dictionary` is the mean difference, weighed in as many
directions drawn at random as the recipe has latents. Of presentation nothing is weighed, so these two have no row.
`semantic guidance` and `latent direction` are in `published.py`; what those methods leave open (warm-up and threshold,
rate and length of the learning) was set on up to 16 pictures of another seed, so that they work as their authors
intend. `Linear-AcT`, `MidSteer` and `EquiSteer` are in `published_activations.py`; their sites and strengths were
set in the same way.

Shares are in %. `kept` compares pictures of the same noise without and with steering: the share that keeps its class,
mean over the other attributes. What a class has by its nature (the beard of a masculine picture, the grey hair of a
senior) is left out of the mean. EPR: change of the attribute's log-odds over that of the others. RMSE of pixels in
[0, 1]; SSIM 1: the same picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import make_prompted_avatars as making  # found by the path that debias sets
import numpy as np
import torch
from debias import BATCH, ROOT, STEPS, Read, draw_all, in_batches, to_images
from debias_prompts import ATTRIBUTES, CFG, OCCUPATIONS
from kornia.metrics import ssim
from PIL import Image
from precision import PRECISION, at_precision, autocast
from prompted_portraits import phrase
from published import LatentDirection, SemanticGuidance, TargetOf, learn_directions, sample_semantic
from published_activations import (
    EquiSteer,
    Gate,
    LinearAcT,
    MidSteer,
    attention_sites,
    fit_equisteer,
    fit_linear_act,
    fit_midsteer,
    norm_sites,
)
from torch import Tensor
from torch.nn import functional as F

from difflens_core.activations import Activations, Edit, capture
from difflens_core.classifiers import AttributeClassifier, load_classifier
from difflens_core.files import fingerprint, load_tensors, save_tensors
from difflens_core.measure import kept_attributes, pixel_change
from difflens_core.networks import (
    Denoiser,
    DenoiserSampler,
    Guidance,
    TextEncoder,
    load_prompted,
    sample,
    start_noise,
)
from difflens_core.report import image_grid
from difflens_core.steer import Recipe, Steering, at_dose, plan_moves, weigh_latents

SEED = 94_001  # of doctors; those of the other prompts follow
# The model's words for the classes, as adjectives of "person" or an occupation.
WORDS = {"presentation": ("male", "female"), "age": ("young", "adult", "old")}
IMPLIED = {"presentation": ("beard",), "age": ("hair_colour", "beard")}  # by a class of the attribute
SUCCESS = (0.95, 0.99)
FINDING = 7_000  # added to a prompt's seed: pictures by which the strengths are found
LEARNING = {"pictures": 100, "steps": 200, "batch": 16, "lr": 0.02, "seed": 92_001}  # pictures: of every class
DRAWN = {name: LEARNING[name] for name in ("pictures", "seed")}
CACHE = ROOT / "benchmarks" / ".work"


@dataclass(frozen=True)
class Setting:
    """What all methods share for one prompt."""

    model: Denoiser
    guidance: Guidance
    noise: Tensor  # n x 3 x H x W
    prompt: str = ""


Draw = Callable[[Setting, TargetOf, float], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to steer. `draw(setting, target_of, strength)` gives pictures (n x 3 x H x W, in [-1, 1]).
    strengths: from weak to strong.
    """

    strengths: tuple[float, ...]
    draw: Draw


def assign(read: Tensor, seed: int) -> Tensor:
    """Class (n, int64) that each picture is asked to show: quotas as equal as n allows, by the fewest changes.

    read: n x K, what the classifier sees in the unsteered pictures.
    """
    own, classes = read.argmax(dim=1, keepdim=True).numpy(), read.shape[1]
    return torch.from_numpy(plan_moves(own, np.full(classes, 1 / classes), seed)[:, 0])


def plain(setting: Setting, *edits: Edit) -> Tensor:
    """Pictures (n x 3 x H x W), under edits of the model's activations if there are any."""
    return draw_all(setting.model, setting.noise, edits, setting.guidance)


def by_recipe(recipe: Recipe) -> Draw:
    """Steering by a recipe at multiples of its own strength."""
    return lambda setting, target_of, strength: plain(setting, Steering(at_dose(recipe, strength), target_of))


def by_direction(directions: Tensor) -> Draw:
    """Steering by a learned direction a class (K x C x H x W)."""
    return lambda setting, target_of, strength: plain(setting, LatentDirection(directions, target_of, strength))


def by_linear_act(sites: Sequence[str], maps: Tensor) -> Draw:
    """Linear-AcT at all sites by their maps (L x S x K x 4 x C)."""

    def draw(setting: Setting, target_of: TargetOf, strength: float) -> Tensor:
        edits = (LinearAcT(site, own, target_of, strength) for site, own in zip(sites, maps, strict=True))
        return plain(setting, *edits)

    return draw


def by_midsteer(means: Tensor, readout: Tensor) -> Draw:
    """MidSteer by what it was fitted to (S x K x C x H x W each)."""
    return lambda setting, target_of, strength: plain(setting, MidSteer(means, readout, target_of, strength))


def by_equisteer(sites: Sequence[str], directions: Tensor, sizes: Tensor, thresholds: Tensor) -> Draw:
    """EquiSteer at all sites (directions: L x S x K x C, sizes and thresholds: L x S x K), behind one gate."""

    def draw(setting: Setting, target_of: TargetOf, strength: float) -> Tensor:
        gate = Gate(sites[0], directions[0, 0], thresholds[0, 0])
        own = zip(sites, directions, sizes, strict=True)
        return plain(setting, *(EquiSteer(*parts, gate, target_of, strength) for parts in own))

    return draw


def by_guidance(edits: Tensor) -> Draw:
    """Semantic guidance by an edit prompt a class (K x T x D)."""

    def draw(setting: Setting, target_of: TargetOf, strength: float) -> Tensor:
        semantic = SemanticGuidance(edits, target_of, strength)
        return in_batches(
            setting.noise,
            lambda noise, first: sample_semantic(setting.model, noise, STEPS, semantic, setting.guidance, first),
        )

    return draw


def in_directions(recipe: Recipe, directions: Tensor) -> Recipe:
    """What `mean_difference` gives, written in unit directions (F x C, F at least C): of all ways the shortest."""
    count, inverse = len(directions), torch.linalg.pinv(directions.T)  # F x C
    levels = replace(recipe.levels, maps=torch.einsum("fc,rcd->rfd", inverse, recipe.levels.maps))
    return replace(
        recipe, features=torch.arange(count), encoder=directions, decoder=directions, bias=torch.zeros(count),
        threshold=torch.full((count,), -1e9), member=torch.ones(len(recipe.classes), count, dtype=torch.bool),
        levels=levels, weight=None,
    )  # fmt: skip


def random_dictionary(
    model: Denoiser, text: TextEncoder, classifier: AttributeClassifier, recipes: Mapping[str, Recipe]
) -> Recipe:
    """The control *mean difference* in as many random directions as the recipe has latents, weighed as that is."""
    own = recipes[DEFAULT]
    draw = torch.Generator().manual_seed(LEARNING["seed"])
    directions = F.normalize(torch.randn(len(own.features), own.channels, generator=draw), dim=1)
    recipe = in_directions(recipes["mean difference"], directions)
    count = own.info["weighed"]["pictures"]
    context = text.encode([f"portrait of {phrase([], job)}" for job in OCCUPATIONS])
    guidance = Guidance(context.repeat_interleave(count // len(context), dim=0), text.encode([""]), CFG)
    sampler = DenoiserSampler(model, STEPS, guidance)
    return weigh_latents(recipe, sampler, classifier, start_noise(count, LEARNING["seed"]))


def methods_of(
    attribute: str, model: Denoiser, text: TextEncoder, directions: Tensor, maps: Mapping[str, Tensor],
    recipes: Mapping[str, Recipe],
) -> dict[str, Method]:  # fmt: skip
    """The methods by name. directions: K x C x H x W; maps: see `maps_of`; recipes: by the way's name."""
    ours, edits = (
        (0.5, 0.75, 1.0, 1.5, 2.5),
        text.encode([f"portrait of {phrase([w], 'person')}" for w in WORDS[attribute]]),
    )
    found = {}
    for name, recipe in recipes.items():
        found[name] = Method(ours, by_recipe(recipe))
        if name in (DEFAULT, "mean difference") and recipe.weight is not None:
            found[f"{name}, all alike"] = Method(ours, by_recipe(replace(recipe, weight=None)))
        if name == DEFAULT:
            found[f"{name}, in one go"] = Method(ours, by_recipe(replace(recipe, hold=False)))
    return found | {
        "semantic guidance": Method((1.0, 2.0, 4.0, 6.0, 8.0), by_guidance(edits)),
        "latent direction": Method((1.0, 1.5, 2.0, 3.0, 4.0), by_direction(directions)),
        "Linear-AcT": Method((1.0, 1.5, 2.0, 3.0, 4.0), by_linear_act(norm_sites(model), maps["linear_act"])),
        "MidSteer": Method((1.0, 1.5, 2.0, 3.0, 4.0), by_midsteer(maps["means"], maps["readout"])),
        "EquiSteer": Method(
            (0.5, 1.0, 1.5, 2.0, 4.0),
            by_equisteer(attention_sites(model), maps["directions"], maps["sizes"], maps["thresholds"]),
        ),
    }


@dataclass(frozen=True)
class Examples:
    """Pictures that the published ways learn from, of every class and occupation equally many.

    named, unnamed: prompts of the same pictures, with and without the class's word; classes: n; noise: as in `Setting`.
    """

    named: Guidance
    unnamed: Guidance
    classes: Tensor
    noise: Tensor

    @classmethod
    def of(cls, text: TextEncoder, attribute: str) -> Examples:
        words, jobs, empty = WORDS[attribute], ("person", *OCCUPATIONS), text.encode([""])
        named = text.encode([f"portrait of {phrase([word], job)}" for word in words for job in jobs])
        unnamed = text.encode([f"portrait of {phrase([], job)}" for _ in words for job in jobs])
        rows = torch.arange(LEARNING["pictures"] * len(words)) % len(named)
        prompts = (Guidance(context[rows], empty, CFG) for context in (named, unnamed))
        return cls(*prompts, rows // len(jobs), start_noise(len(rows), LEARNING["seed"]))


def learned(
    name: str, model: Denoiser, attribute: str, learn: Callable[[], Mapping[str, Tensor]], **how: Any
) -> tuple[Mapping[str, Tensor], float]:
    """What `learn` gives and the seconds it took. Learned once for all prompts, and kept in a file for the next run."""
    file = CACHE / f"{name}_{attribute}.safetensors"
    made_by = {"model": fingerprint(model.state_dict()), "words": list(WORDS[attribute]), **how}
    if file.exists():
        tensors, info = load_tensors(file, name)
        if info["made_by"] == made_by:
            return tensors, info["seconds"]
    began = time.time()
    tensors = learn()
    seconds = time.time() - began
    save_tensors(file, name, tensors, {"made_by": made_by, "seconds": seconds})
    return tensors, seconds


def directions_of(model: Denoiser, examples: Examples) -> dict[str, Tensor]:
    """Latent directions of an attribute's classes (K x C x H x W)."""
    with autocast():  # as the model was trained
        pictures = plain(Setting(model, examples.named, examples.noise))
    options = {name: LEARNING[name] for name in ("steps", "batch", "lr", "seed")}
    found = learn_directions(model, pictures, examples.unnamed.context, examples.classes, **options)
    return {"directions": found}


def maps_of(model: Denoiser, examples: Examples) -> dict[str, Tensor]:
    """What the methods of `published_activations.py` are made of, by method and name."""
    norms, attentions, classes = norm_sites(model), attention_sites(model), examples.classes

    def captured(guidance: Guidance, sites: tuple[str, ...]) -> list[Activations]:
        sampler = DenoiserSampler(model, STEPS, guidance)
        store = capture(sampler, len(classes), LEARNING["seed"], BATCH, sites)
        return [store.activations(site) for site in sites]

    def again(edits: Sequence[Edit], pictures: Tensor) -> None:
        sample(model, examples.noise[pictures], STEPS, edits, guidance=examples.named.of(pictures))

    with autocast():
        middle, *named = captured(examples.named, (MidSteer.site, *norms, *attentions))
        unnamed = captured(examples.unnamed, attentions)
        found = {"linear_act": fit_linear_act(again, named[: len(norms)], classes)}
    found["means"], found["readout"] = fit_midsteer(middle, classes)
    pairs = zip(named[len(norms) :], unnamed, strict=True)
    parts = zip(*(fit_equisteer(*pair, classes) for pair in pairs), strict=True)
    return found | dict(zip(("directions", "sizes", "thresholds"), map(torch.stack, parts), strict=True))


@dataclass(frozen=True)
class Task:
    """An attribute of one prompt's pictures: equal quotas of its classes, met by as few changes as possible."""

    attribute: str
    classes: tuple[str, ...]
    before: Read
    asked: Tensor  # n, the class that each picture is to show
    moved: Tensor  # n, whether it has to change for that

    @classmethod
    def of(cls, before: Read, attribute: str, classes: tuple[str, ...], seed: int) -> Task:
        asked = assign(before.seen[attribute], seed)
        return cls(attribute, classes, before, asked, asked != before.shown(attribute))


def log_odds(seen: Tensor) -> Tensor:
    """Of probabilities, kept away from certainty."""
    return torch.logit(seen.double().clamp(1e-6, 1 - 1e-6))


def score(task: Task, after: Read) -> dict[str, Any]:
    """Success of the pictures that were to change (`after`), and how like before they are."""
    attribute, unsteered = task.attribute, task.before.where(task.moved)
    kept = kept_attributes(unsteered.seen, after.seen, attribute)
    counted = [name for name in kept if name not in IMPLIED[attribute]]
    changed = {
        name: float((log_odds(after.seen[name]) - log_odds(seen)).abs().mean()) for name, seen in unsteered.seen.items()
    }
    per_picture = torch.stack([(after.shown(name) == unsteered.shown(name)).double() for name in counted]).mean(dim=0)
    return {
        "success": float((after.shown(attribute) == task.asked[task.moved]).float().mean()),
        "kept": kept,
        "mean_kept": float(np.mean([kept[name] for name in counted])),
        "per_picture": per_picture.tolist(),
        "epr": changed[attribute] / float(np.mean([changed[name] for name in counted])),
        "rmse": pixel_change(unsteered.pictures.numpy(), after.pictures.numpy()),
        "ssim": float(ssim(unsteered.pictures.movedim(-1, 1), after.pictures.movedim(-1, 1), 11).mean()),
    }


SHORT = (
    "presentation",
    "age",
    "skin_tone",
    "hair_colour",
    "occupation",
    "background",
    "glasses",
    "expression",
    "beard",
)
HEADER = f"{'':27s} at   strength success  kept  {' '.join(f'{name[:6]:>6s}' for name in SHORT)}    EPR  RMSE  SSIM"


def line(name: str, at: float, strength: str, r: Mapping[str, Any]) -> str:
    """A line of the table under HEADER."""
    shares = " ".join(f"{100 * r['kept'][key]:6.1f}" if key in r["kept"] else f"{'-':>6s}" for key in SHORT)
    head = f"{name:27s} {at:.2f} {strength:>8s} {r['success']:7.3f} {100 * r['mean_kept']:5.1f}"
    return f"{head}  {shares}  {r['epr']:5.2f} {r['rmse']:.3f} {r['ssim']:.3f}"


def steered(setting: Setting, task: Task, method: Method, strength: float, classifier: AttributeClassifier) -> Read:
    """The pictures that were to change."""
    to_change, targets = replace(setting, noise=setting.noise[task.moved]), task.asked[task.moved]
    return Read.of(to_images(method.draw(to_change, lambda i: targets[i], strength)), classifier)


def weakest(setting: Setting, task: Task, method: Method, classifier: AttributeClassifier) -> dict[float, tuple]:
    """For every success asked for the weakest strength that reaches it, and whether it does."""
    found: list[tuple[float, float]] = []
    for strength in method.strengths:
        after = steered(setting, task, method, strength, classifier)
        found.append((float((after.shown(task.attribute) == task.asked[task.moved]).float().mean()), strength))
        if found[-1][0] >= max(SUCCESS):
            break
    best = max(found, key=lambda pair: (pair[0], -pair[1]))[1]
    reached = {at: [strength for success, strength in found if success >= at] for at in SUCCESS}
    return {at: (strengths[0], True) if strengths else (best, False) for at, strengths in reached.items()}


def compare(
    settings: tuple[Setting, Setting],
    seed: int,
    methods: Mapping[str, Mapping[str, Method]],
    classifier: AttributeClassifier,
    on_rows: Callable[[str, list[np.ndarray], list[str]], None],
) -> list[dict]:
    """Results of all methods of every attribute for one prompt, printed as they come.

    settings: to find the strengths, and to report. on_rows: gets an attribute, pictures of every way and their titles,
    those without steering first.
    """
    results = []
    befores = [Read.of(to_images(plain(setting)), classifier) for setting in settings]
    for attribute, own in methods.items():
        classes = classifier.attributes[attribute]
        finding, task = (Task.of(before, attribute, classes, seed) for before in befores)
        print(f"\n{settings[1].prompt}, {attribute}: {task.moved.sum()} to change\n{HEADER}")
        rows, titles = [befores[1].where(task.moved).pictures], ["before"]
        for name, method in own.items():
            drawn: dict[float, Read] = {}
            for at, (strength, reached) in weakest(settings[0], finding, method, classifier).items():
                if strength not in drawn:
                    drawn[strength] = steered(settings[1], task, method, strength, classifier)
                scores = score(task, drawn[strength])
                print(line(name, at, f"{strength:g}{' ' if reached else '!'}", scores), flush=True)
                results.append(
                    {
                        "way": "default" if name == DEFAULT else name,
                        "model": "prompted_avatars",
                        "attribute": attribute,
                        "at_success": at,
                        "reached": reached,
                        "strength": strength,
                        **scores,
                    }
                )
            rows.append(drawn[strength].pictures)
            titles.append(f"{name}, strength {strength:g}")
        on_rows(attribute, [(pictures[:12] * 255).round().byte().numpy() for pictures in rows], titles)
    return results


def print_means(results: Sequence[Mapping]) -> None:
    """Mean over prompts and attributes of what is kept, and the interval of the difference from the default's."""
    print(f"\nmean over all{'':23s} at   kept   default minus this [95 %]   EPR  SSIM")
    for at in SUCCESS:
        own = {(r["prompt"], r["attribute"]): r for r in results if (r["way"], r["at_success"]) == ("default", at)}
        for way in dict.fromkeys(r["way"] for r in results):
            rows = [r for r in results if (r["way"], r["at_success"]) == (way, at)]
            pairs = [np.subtract(own[r["prompt"], r["attribute"]]["per_picture"], r["per_picture"]) for r in rows]
            gain, error = np.mean([d.mean() for d in pairs]), np.sqrt(sum(d.var() / len(d) for d in pairs)) / len(pairs)
            kept, epr, like = (np.mean([r[key] for r in rows]) for key in ("mean_kept", "epr", "ssim"))
            mark = "" if all(r["reached"] for r in rows) else "!"
            mark += "" if len(rows) == len(own) else f" ({len(rows)} of {len(own)})"
            interval = f"{100 * gain:5.1f} [{100 * (gain - 1.96 * error):5.1f}, {100 * (gain + 1.96 * error):5.1f}]"
            print(f"{way + mark:36s} {at:.2f} {100 * kept:5.1f}   {interval:26s} {epr:5.2f} {like:.3f}")


DEFAULT = "SAE recipe"  # what we ship


def save_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--prompts", nargs="+", choices=OCCUPATIONS, default=["doctor", "nurse"])
    parser.add_argument("--attributes", nargs="+", choices=ATTRIBUTES, default=list(ATTRIBUTES))
    parser.add_argument("--grids", type=Path, help="a folder for pictures of every way")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = load_prompted(making.DENOISER_FILE)
    classifier = load_classifier(making.CLASSIFIER_FILE)
    began, results, methods, ways = time.time(), [], {}, making.ways(controlled=True)
    for attribute in options.attributes:
        examples = Examples.of(text, attribute)
        directions, learning = learned(
            "directions", model, attribute, partial(directions_of, model, examples), **LEARNING
        )
        maps, fitting = learned("maps", model, attribute, partial(maps_of, model, examples), **DRAWN)
        recipes = ways[attribute]
        if recipes[DEFAULT].weight is not None:
            recipes["random dictionary"] = random_dictionary(model, text, classifier, recipes)
        methods[attribute] = methods_of(attribute, model, text, directions["directions"], maps, recipes)
        print(f"{attribute}: latent directions learned in {learning:.0f} s, maps fitted in {fitting:.0f} s", flush=True)
    model = at_precision(model)
    print(f"n = {options.pictures} a prompt, cfg {CFG:g}, {STEPS} steps, seeds from {SEED}, {PRECISION}; shares in %")
    for job in options.prompts:

        def save_grid(attribute: str, rows: list[np.ndarray], titles: list[str], job: str = job) -> None:
            if options.grids:
                save_picture(options.grids / f"{job}_{attribute}.png", image_grid(rows, titles, columns=12))

        seed = SEED + OCCUPATIONS.index(job)
        prompt = f"portrait of {phrase([], job)}"
        guidance = Guidance(text.encode([prompt]), text.encode([""]), CFG)
        finding, reporting = (
            Setting(model, guidance, start_noise(count, own), prompt)
            for count, own in ((64, seed + FINDING), (options.pictures, seed))
        )
        found = compare((finding, reporting), seed, methods, classifier, save_grid)
        results += [{"prompt": prompt, **result} for result in found]
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print_means(results)
    print(f"\n{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
