"""Does one recipe debias every prompt? Fairness per occupation before and after steering, with controls.

    python benchmarks/debias_prompts.py                    256 pictures per occupation
    python benchmarks/debias_prompts.py --controls         with the controls of `debias.py`
    python benchmarks/debias_prompts.py --json FILE        the same numbers for machines

Sampled with guidance (cfg 2). The seeds are ones on which no strength was tuned. `occupation` is the share of pictures
in which the classifier still sees the occupation asked for; the columns after it are the share that keeps its
class.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from debias import ROOT, STEPS, Read, measured, outcome, recipes_of, run
from precision import PRECISION, at_precision

from difflens_core.classifiers import load_classifier
from difflens_core.networks import Guidance, load_prompted

FILES = ROOT / "models" / "prompted_avatars"
OCCUPATIONS = ("doctor", "nurse", "firefighter", "receptionist")
ATTRIBUTES = ("presentation", "age")
SHOWN = ("presentation", "age", "skin_tone", "hair_colour", "background")
SEED = 91_001
CFG = 2.0


def row(name: str, result: dict, attribute: str) -> str:
    kept = " ".join(f"{100 * result['kept'][key]:11.1f}" for key in SHOWN if key != attribute)
    return f"  {measured(name, result)}  {100 * result['occupation']:10.1f} {kept}  {result['pixel_change']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    model = at_precision(model)
    classifier = load_classifier(FILES / "difflens_classifiers" / "prompted_avatars.safetensors")
    jobs = classifier.attributes["occupation"]
    began, results = time.time(), {}
    how = f"cfg {CFG:g}, {STEPS} steps, seeds from {SEED}, {PRECISION}"
    print(f"n = {options.pictures} per occupation, {how}; shares in %")
    for number, job in enumerate(OCCUPATIONS):
        seed = SEED + number
        guidance = Guidance(text.encode([f"portrait of a {job}"]), text.encode([""]), CFG)
        before = Read.of(run(model, options.pictures, None, seed, guidance)[0], classifier)
        results[job] = {}
        for attribute in ATTRIBUTES:
            others = " ".join(f"{name:>11s}" for name in SHOWN if name != attribute)
            print(f"\n{job}, {attribute}")
            print(f"  {'':18s} FD [95 % interval] hard          success  occupation {others}  change")
            results[job][attribute] = found = {}
            file = FILES / "difflens_recipes" / f"prompted_avatars_{attribute}.safetensors"
            recipes = recipes_of(file, f"prompted_{attribute}", options.controls)
            for name, recipe in {"before": None, **recipes}.items():
                after, targets = before, None
                if recipe:
                    drawn, targets = run(model, options.pictures, recipe, seed, guidance)
                    after = Read.of(drawn, classifier)
                found[name] = outcome(classifier.attributes[attribute], before, after, attribute, targets)
                recognised = after.shown("occupation") == jobs.index(job)
                found[name] |= {"occupation": float(recognised.float().mean())}
                print(row(name, found[name], attribute), flush=True)
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
