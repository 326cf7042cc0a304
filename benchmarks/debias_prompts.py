"""Does one recipe debias every prompt? Fairness per occupation before and after steering, with controls.

    python benchmarks/debias_prompts.py                    256 pictures per occupation
    python benchmarks/debias_prompts.py --controls         with the controls of `debias.py`
    python benchmarks/debias_prompts.py --json FILE        the same numbers for machines

Sampled with guidance (cfg 2). The seeds are ones on which no strength was tuned. `occupation` is the share of pictures
in which the classifier still sees the occupation asked for; the columns after it are the share that keeps its class.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from debias import ROOT, STEPS, outcome, run

from difflens_core.classifier import load_classifier
from difflens_core.denoiser import load_prompted
from difflens_core.recipes import Recipe, load_recipe, with_settings
from difflens_core.sampling import Guidance

FILES = ROOT / "models" / "prompted_avatars"
OCCUPATIONS = ("doctor", "nurse", "firefighter", "receptionist")
ATTRIBUTES = ("presentation", "age")
SHOWN = ("presentation", "age", "skin_tone", "background")
SEED = 91_001
CFG = 2.0


def recipes_of(attribute: str, controls: bool) -> dict[str, Recipe]:
    """The recipe of an attribute and its controls, by name."""
    folder = FILES / "difflens_recipes"
    found = {"SAE recipe": load_recipe(folder / f"prompted_avatars_{attribute}.safetensors")}
    if controls:
        found["random features"] = load_recipe(folder / "controls" / f"prompted_{attribute}_random.safetensors")
        name = f"prompted_{attribute}_mean_difference.safetensors"
        found["mean difference"] = load_recipe(folder / "controls" / name)
        found["strength 0"] = with_settings(found["SAE recipe"], strength=0.0)
    return found


def row(name: str, result: dict, attribute: str) -> str:
    kept = " ".join(f"{100 * result['kept'][key]:10.1f}" for key in SHOWN if key != attribute)
    success = "  -  " if result["success"] is None else f"{result['success']:.3f}"
    low, high = result["fd_ci"]
    fd = f"{result['fd']:.3f} [{low:.3f}, {high:.3f}] {result['fd_hard']:.3f}"
    return f"  {name:18s} {fd:28s}  {success}  {100 * result['occupation']:10.1f} {kept}  {result['pixel_change']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    classifier = load_classifier(FILES / "difflens_classifiers" / "prompted_avatars.safetensors")
    jobs = classifier.attributes["occupation"]
    began, results = time.time(), {}
    print(f"n = {options.pictures} per occupation, cfg {CFG:g}, {STEPS} steps, seeds from {SEED}; shares in %")
    for number, job in enumerate(OCCUPATIONS):
        seed = SEED + number
        guidance = Guidance(text.encode([f"portrait of a {job}"]), text.encode([""]), CFG)
        pictures, _ = run(model, options.pictures, None, seed, guidance)
        before = pictures, classifier.classify(pictures)
        results[job] = {}
        for attribute in ATTRIBUTES:
            others = " ".join(f"{name:>10s}" for name in SHOWN if name != attribute)
            print(f"\n{job}, {attribute}")
            print(f"  {'':18s} FD [95 % interval] hard          success  occupation {others}  change")
            results[job][attribute] = found = {}
            for name, recipe in {"before": None, **recipes_of(attribute, options.controls)}.items():
                drawn, targets = run(model, options.pictures, recipe, seed, guidance) if recipe else (pictures, None)
                after = drawn, classifier.classify(drawn)
                found[name] = outcome(classifier, before, after, attribute, targets)
                seen = after[1]["occupation"].argmax(dim=1) == jobs.index(job)
                found[name] |= {"occupation": float(seen.float().mean()), "identical": torch.equal(drawn, pictures)}
                print(row(name, found[name], attribute), flush=True)
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
