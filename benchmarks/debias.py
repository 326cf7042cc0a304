"""Does the method do what it says on the avatars? Fairness before and after steering, with controls.

    python benchmarks/debias.py                    512 pictures per attribute
    python benchmarks/debias.py --pictures 2048 --no-controls
    python benchmarks/debias.py --json FILE        the same numbers for machines

The seed is one on which no strength was tuned. All runs of an attribute start from the same noise, so that pictures
are paired: `kept` is the share whose other attributes, background and clothes read as before. The model runs in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from difflens_core.classifiers import load_classifier  # noqa: E402
from difflens_core.measure import kept_attributes, measure_fairness, pixel_change  # noqa: E402
from difflens_core.networks import Denoiser, Guidance, load_denoiser, sample, start_noise  # noqa: E402  # noqa: E402
from difflens_core.steer import (  # noqa: E402
    Recipe,
    Steering,  # noqa: E402
    load_recipe,
)
from difflens_core.targets import Targets, parse_target  # noqa: E402

AVATARS = ROOT / "models" / "avatars"
ATTRIBUTES = ("presentation", "age", "skin_tone")
SEED = 90_001
STEPS = 20
BATCH = 64


def in_bf16(model: Denoiser) -> Denoiser:
    """The model with bf16 weights, as hosts run it: pictures go in and come out in fp32. 1.6 times as fast on CPUs."""
    model = model.bfloat16().to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(lambda module, given: tuple(x if x is None else x.bfloat16() for x in given))
    model.register_forward_hook(lambda module, given, x0: x0.float())
    return model


def fair_targets(recipe: Recipe, seed: int) -> Targets:
    """Classes dealt out in equal shares."""
    return Targets(recipe.attribute, recipe.classes, tuple(parse_target("uniform", recipe.classes)), seed)


def run(
    model: Denoiser, count: int, recipe: Recipe | None = None, seed: int = SEED, guidance: Guidance | None = None
) -> tuple[torch.Tensor, Targets | None]:
    """Pictures (n x H x W x 3 in [0, 1]) and the classes they were asked to show."""
    targets = recipe and fair_targets(recipe, seed)
    steerings = [Steering(recipe, targets.of)] if recipe else []
    parts = []
    for first, noise in zip(range(0, count, BATCH), start_noise(count, seed).split(BATCH), strict=True):
        own = guidance and guidance.of(slice(first, first + len(noise)))
        parts.append(sample(model, noise, STEPS, steerings, first, own))
    return torch.cat(parts).movedim(1, -1) / 2 + 0.5, targets


Read = tuple[torch.Tensor, dict[str, torch.Tensor]]  # pictures, and what the classifier sees in them


def outcome(classifier, before: Read, after: Read, attribute: str, targets: Targets | None) -> dict:
    """Fairness of `after`, success, what was kept and how much the pictures changed."""
    (pictures_before, read_before), (pictures_after, read_after) = before, after
    classes = classifier.attributes[attribute]
    report = measure_fairness(
        read_after[attribute].numpy(),
        parse_target("uniform", classes),
        attribute,
        classes,
        targets.first(len(pictures_after)) if targets else None,
    )
    return asdict(report) | {
        "kept": kept_attributes(read_before, read_after, attribute),
        "pixel_change": pixel_change(pictures_before.numpy(), pictures_after.numpy()),
    }


def recipes_of(recipe_file: Path, control: str, controls: bool) -> dict[str, Recipe]:
    """The recipe in a file and, if asked, its controls, by name; `control`: what their files' names begin with."""
    recipe = load_recipe(recipe_file)
    found = {"SAE recipe": recipe}
    if controls:
        folder = recipe_file.parent / "controls"
        found["random features"] = load_recipe(folder / f"{control}_random.safetensors")
        found["mean difference"] = load_recipe(folder / f"{control}_mean_difference.safetensors")
    return found


def measured(name: str, result: dict) -> str:
    """What every table begins with: name, FD with interval, FD of counts, success."""
    success = "  -  " if result["success"] is None else f"{result['success']:.3f}"
    low, high = result["fd_ci"]
    fd = f"{result['fd']:.3f} [{low:.3f}, {high:.3f}] {result['fd_hard']:.3f}"
    return f"{name:18s} {fd:28s}  {success}"


def row(name: str, result: dict) -> str:
    kept = result["kept"]
    others = " ".join(f"{100 * kept[key]:5.1f}" for key in kept if key in ATTRIBUTES)
    nuisance = f"{100 * kept['background']:5.1f} {100 * kept['clothes']:5.1f}"
    return f"{measured(name, result)}  {others:11s}  {nuisance}  {result['pixel_change']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = in_bf16(load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors"))
    classifier = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    began = time.time()
    pictures, _ = run(model, options.pictures)
    before = pictures, classifier.classify(pictures)
    results: dict[str, dict] = {}
    print(f"n = {options.pictures}, {STEPS} steps, seed {SEED}; kept and others in %")
    for attribute in ATTRIBUTES:
        others = [name for name in ATTRIBUTES if name != attribute]
        kept = f"{' '.join(others)} background clothes"
        print(f"\n{attribute:18s} FD [95 % interval] hard        success  {kept}  change")
        results[attribute] = {"before": outcome(classifier, before, before, attribute, None)}
        print(row("before", results[attribute]["before"]), flush=True)
        file = AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors"
        for name, recipe in recipes_of(file, attribute, not options.no_controls).items():
            steered, targets = run(model, options.pictures, recipe)
            after = steered, classifier.classify(steered)
            results[attribute][name] = outcome(classifier, before, after, attribute, targets)
            print(row(name, results[attribute][name]), flush=True)
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
