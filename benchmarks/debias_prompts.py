"""Does one recipe debias every prompt? Fairness per occupation before and after steering.

    python benchmarks/debias_prompts.py                    256 pictures per occupation
    python benchmarks/debias_prompts.py --controls         beside those of `debias.py`
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

import make_prompted_avatars as making  # found by the path that debias sets
from debias import STEPS, Read, measured, outcome, run
from precision import PRECISION, at_precision

from difflens_core.classifiers import load_classifier
from difflens_core.networks import Guidance, load_prompted

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
    model, text = load_prompted(making.DENOISER_FILE)
    model = at_precision(model)
    classifier = load_classifier(making.CLASSIFIER_FILE)
    jobs = classifier.attributes["occupation"]
    began, results, ways = time.time(), {}, making.ways(options.controls)
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
            for name, recipe in {"before": None, **ways[attribute]}.items():
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
