"""Five ways to debias a prompt side by side: the same noise, the same quotas, the same number of strengths.

    python benchmarks/compare.py                    64 pictures for every prompt, attribute, method and strength
    python benchmarks/compare.py --pictures 128 --prompts doctor nurse firefighter receptionist
    python benchmarks/compare.py --chart FILE.png --grids FOLDER --json FILE

Every class gets equally many pictures, and as few as possible change: what the classifier sees in the unsteered
pictures decides which (`plan_moves`), the same for all methods. `success`, `kept` and what follows are of the pictures
that are to change; the others stay as they are. FD is of all.

Sampled with guidance (cfg 2), 20 steps. Strengths of `SAE recipe`, `mean difference` and `random features` are
multiples of the shipped ones. `SAE recipe`, `mean difference` and `random features` are the shipped files
(see `debias.py`), `semantic guidance` and `latent direction` are in `published.py`. Every method gets four strengths,
from too weak to too strong, about the shipped or published one (*). Nothing was tuned on these seeds. What the
published methods leave open (warm-up and threshold, rate and length of the learning) was set on up to 16
pictures of another seed, so that they work as their authors intend.

Shares are in %. `kept` compares pictures of the same noise without and with steering: the share that keeps its class,
mean over the other attributes and the occupation. So do RMSE (of pixels in [0, 1]) and SSIM (1: the same picture).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from debias import ROOT, STEPS, Read, draw_all, in_batches, recipes_of, to_images
from debias_prompts import ATTRIBUTES, CFG, FILES, OCCUPATIONS
from kornia.metrics import ssim
from PIL import Image
from precision import PRECISION, at_precision, autocast
from prompted_portraits import phrase
from published import LatentDirection, SemanticGuidance, TargetOf, learn_directions, sample_semantic
from torch import Tensor

from difflens_core.activations import Edit
from difflens_core.classifiers import AttributeClassifier, load_classifier
from difflens_core.files import fingerprint, load_tensors, save_tensors
from difflens_core.measure import kept_attributes, measure_fairness, pixel_change
from difflens_core.networks import Denoiser, Guidance, TextEncoder, load_prompted, start_noise
from difflens_core.report import image_grid, line_chart
from difflens_core.steer import Recipe, Steering, at_dose, plan_moves
from difflens_core.targets import parse_target

SEED = 94_001  # of doctors; those of the other prompts follow
# The model's words for the classes, as adjectives of "person" or an occupation.
WORDS = {"presentation": ("male", "female"), "age": ("young", "adult", "old")}
OTHERS = ("presentation", "age", "skin_tone", "occupation")
LEARNING = {"pictures": 100, "steps": 200, "batch": 16, "lr": 0.02, "seed": 92_001}  # pictures: of every class
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

    usual: the strength that is shipped or published.
    """

    strengths: tuple[float, ...]
    usual: float
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


def by_guidance(edits: Tensor) -> Draw:
    """Semantic guidance by an edit prompt a class (K x T x D)."""

    def draw(setting: Setting, target_of: TargetOf, strength: float) -> Tensor:
        semantic = SemanticGuidance(edits, target_of, strength)
        return in_batches(
            setting.noise,
            lambda noise, first: sample_semantic(setting.model, noise, STEPS, semantic, setting.guidance, first),
        )

    return draw


def methods_of(attribute: str, text: TextEncoder, directions: Tensor) -> dict[str, Method]:
    """The methods by name."""
    file = FILES / "difflens_recipes" / f"prompted_avatars_{attribute}.safetensors"
    recipes = recipes_of(file, f"prompted_{attribute}", controls=True)
    ours = (0.5, 1.0, 1.5, 2.5), 1.0
    edits = text.encode([f"portrait of {phrase([word], 'person')}" for word in WORDS[attribute]])
    return {
        "SAE recipe": Method(*ours, by_recipe(recipes["SAE recipe"])),
        "mean difference": Method(*ours, by_recipe(recipes["mean difference"])),
        "random features": Method(*ours, by_recipe(recipes["random features"])),
        "semantic guidance": Method((1.0, 2.0, 4.0, 8.0), 4.0, by_guidance(edits)),
        "latent direction": Method((1.0, 1.5, 2.0, 3.0), 1.0, by_direction(directions)),
    }


def learned_directions(model: Denoiser, text: TextEncoder, attribute: str) -> tuple[Tensor, float]:
    """Directions of an attribute's classes (K x C x H x W) and the seconds it took to learn them.

    Learned once for all prompts, from pictures of every occupation, and kept in a file for the next run.
    """
    file, words = CACHE / f"directions_{attribute}.safetensors", WORDS[attribute]
    made_by = {"model": fingerprint(model.state_dict()), "words": list(words), **LEARNING}
    if file.exists():
        tensors, info = load_tensors(file, "directions")
        if info["made_by"] == made_by:
            return tensors["directions"], info["seconds"]
    began, jobs = time.time(), ("person", *OCCUPATIONS)
    named = text.encode([f"portrait of {phrase([word], job)}" for word in words for job in jobs])
    unnamed = text.encode([f"portrait of {phrase([], job)}" for _ in words for job in jobs])
    rows = torch.arange(LEARNING["pictures"] * len(words)) % len(named)
    noise = start_noise(len(rows), LEARNING["seed"])
    with autocast():  # as the model was trained
        pictures = plain(Setting(model, Guidance(named[rows], text.encode([""]), CFG), noise))
    options = {name: LEARNING[name] for name in ("steps", "batch", "lr", "seed")}
    directions = learn_directions(model, pictures, unnamed[rows], rows // len(jobs), **options)
    seconds = time.time() - began
    save_tensors(file, "directions", {"directions": directions}, {"made_by": made_by, "seconds": seconds})
    return directions, seconds


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


def score(task: Task, after: Read) -> dict[str, float]:
    """Fairness of all pictures; success of those that were to change (`after`), and how like before they are."""
    attribute, classes, asked, unsteered = task.attribute, task.classes, task.asked, task.before.where(task.moved)
    seen = task.before.seen[attribute].clone()
    seen[task.moved] = after.seen[attribute]
    report = measure_fairness(seen.numpy(), parse_target("uniform", classes), attribute, classes, asked.numpy())
    kept = kept_attributes(unsteered.seen, after.seen, attribute)
    return {
        "fd": report.fd,
        "fd_hard": report.fd_hard,
        "success": float((after.shown(attribute) == asked[task.moved]).float().mean()),
        "kept": float(np.mean([kept[name] for name in OTHERS if name in kept])),
        "occupation": kept["occupation"],
        "background": kept["background"],
        "rmse": pixel_change(unsteered.pictures.numpy(), after.pictures.numpy()),
        "ssim": float(ssim(unsteered.pictures.movedim(-1, 1), after.pictures.movedim(-1, 1), 11).mean()),
    }


HEADER = f"{'':18s} strength     FD   hard  success   kept  occupation  background   RMSE   SSIM  s/picture"


def line(name: str, strength: str, r: Mapping[str, float]) -> str:
    """A line of the table under HEADER."""
    shares = f"{100 * r['kept']:6.1f}      {100 * r['occupation']:6.1f}      {100 * r['background']:6.1f}"
    fd = f"{r['fd']:.3f}  {r['fd_hard']:.3f}"
    change = f"{r['rmse']:.3f}  {r['ssim']:.3f}  {r['seconds']:9.2f}"
    return f"{name:18s} {strength:>8s}  {fd}   {r['success']:6.3f} {shares}  {change}"


def steered(
    setting: Setting, task: Task, method: Method, classifier: AttributeClassifier
) -> Iterator[tuple[float, dict[str, float], Read]]:
    """Every strength of a method with its scores and the pictures that were to change."""
    to_change, targets = replace(setting, noise=setting.noise[task.moved]), task.asked[task.moved]
    for strength in method.strengths:
        since = time.time()
        drawn = method.draw(to_change, lambda i: targets[i], strength)
        seconds = (time.time() - since) / len(drawn)
        after = Read.of(to_images(drawn), classifier)
        yield strength, score(task, after) | {"seconds": seconds}, after


def compare(
    setting: Setting,
    seed: int,
    methods: Mapping[str, Mapping[str, Method]],
    classifier: AttributeClassifier,
    on_rows: Callable[[str, str, list[np.ndarray]], None],
) -> list[dict]:
    """Results of all methods of every attribute for one prompt, printed as they come.

    on_rows: gets attribute, method and its pictures, those without steering first.
    """
    results, before = [], Read.of(to_images(plain(setting)), classifier)
    for attribute, own in methods.items():
        task = Task.of(before, attribute, classifier.attributes[attribute], seed)
        same = before.where(task.moved)
        unsteered = score(task, same) | {"seconds": 0.0}
        print(f"\n{setting.prompt}, {attribute}: {task.moved.sum()} to change")
        print(f"{HEADER}\n{line('before', '', unsteered)}")
        for name, method in own.items():
            rows = [same.pictures]
            for strength, scores, after in steered(setting, task, method, classifier):
                results.append({"attribute": attribute, "method": name, "strength": strength, **scores})
                rows.append(after.pictures)
                print(line(name, label(method, strength), scores), flush=True)
            on_rows(attribute, name, [(pictures[:12] * 255).round().byte().numpy() for pictures in rows])
    return results


def label(method: Method, strength: float) -> str:
    return f"{strength:g}{'*' if strength == method.usual else ' '}"


def means(results: Sequence[Mapping], methods: Mapping[str, Method]) -> dict[str, list[dict[str, float]]]:
    """Mean over prompts and attributes of every score: a list in order of strength for each method."""
    scores = [key for key in results[0] if key not in ("prompt", "attribute", "method", "strength")]
    found = {}
    for name, method in methods.items():
        of = [[r for r in results if (r["method"], r["strength"]) == (name, s)] for s in method.strengths]
        found[name] = [{key: float(np.mean([r[key] for r in rows])) for key in scores} for rows in of]
    return found


def chart_of(mean: Mapping[str, Sequence[Mapping[str, float]]]) -> np.ndarray:
    """FD against likeness: a line a method, a point a strength."""
    lines = {name: [(r["ssim"], r["fd"]) for r in rows] for name, rows in mean.items()}
    x_label = "likeness to the picture without steering (SSIM)"
    return line_chart("FD against likeness: lower right is better", lines, x_label, "FD")


def save_picture(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--prompts", nargs="+", choices=OCCUPATIONS, default=["doctor", "nurse"])
    parser.add_argument("--attributes", nargs="+", choices=ATTRIBUTES, default=list(ATTRIBUTES))
    parser.add_argument("--chart", type=Path, default=CACHE / "compare.png")
    parser.add_argument("--grids", type=Path, help="a folder for pictures of every method")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    classifier = load_classifier(FILES / "difflens_classifiers" / "prompted_avatars.safetensors")
    began, results, methods = time.time(), [], {}
    for attribute in options.attributes:
        directions, seconds = learned_directions(model, text, attribute)
        methods[attribute] = methods_of(attribute, text, directions)
        print(f"latent directions of {attribute}: learned in {seconds:.0f} s", flush=True)
    model = at_precision(model)
    print(f"n = {options.pictures} a row, cfg {CFG:g}, {STEPS} steps, seeds from {SEED}, {PRECISION}; shares in %")
    for job in options.prompts:

        def save_grid(attribute: str, name: str, rows: list[np.ndarray], job: str = job) -> None:
            if options.grids:
                titles = ["before", *(f"{name}, strength {s:g}" for s in methods[attribute][name].strengths)]
                file = options.grids / f"{job}_{attribute}_{name.replace(' ', '_')}.png"
                save_picture(file, image_grid(rows, titles, columns=12))

        seed = SEED + OCCUPATIONS.index(job)
        prompt = f"portrait of {phrase([], job)}"
        guidance = Guidance(text.encode([prompt]), text.encode([""]), CFG)
        setting = Setting(model, guidance, start_noise(options.pictures, seed), prompt)
        found = compare(setting, seed, methods, classifier, save_grid)
        results += [{"prompt": prompt, **result} for result in found]
    some = methods[options.attributes[0]]
    mean = means(results, some)
    print(f"\nmean over {', '.join(options.prompts)} and {', '.join(options.attributes)}\n{HEADER}")
    for name, method in some.items():
        for strength, scores in zip(method.strengths, mean[name], strict=True):
            print(line(name, label(method, strength), scores))
    save_picture(options.chart, chart_of(mean))
    print(f"\nchart: {options.chart}\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
