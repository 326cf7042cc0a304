"""Does one recipe serve pictures of every size, wherever the person is? Fairness of people in scenes, before and after.

    python benchmarks/scenes.py                        128 pictures for each prompt and size
    python benchmarks/scenes.py --pictures 256 --json FILE
    python benchmarks/scenes.py --controls             beside random latents and the raw mean difference
    python benchmarks/scenes.py --grids FOLDER         pictures before and after, for each prompt, size and attribute

The recipes were made on pictures of one size (see models/scenes). Sampled with guidance (cfg 2), 20 steps, on seeds on
which no strength was tuned; the prompts name every place and size of the figure in turn. After FD and success there is
the share of all pictures that keep their class, for each other attribute. --controls captures first, which takes
minutes; the controls learn from the same twins as the recipe does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debias import Read, measured, outcome, run
from make_scenes import CFG, CLASSIFIER_FILE, DENOISER_FILE, everywhere, ways  # found by the path that debias sets
from PIL import Image
from precision import PRECISION, at_precision
from prompted_portraits import phrase
from scenes import ATTRIBUTES, SIZES
from torch import Tensor

from difflens_core.classifiers import load_classifier
from difflens_core.networks import load_prompted
from difflens_core.report import image_grid

SEED = 97_001
SHOWN = ("presentation", "age", "skin_tone", "hair_colour", "glasses", "occupation", "background")


def shown_beside(attribute: str) -> list[str]:
    """The attributes that are to stay while one is steered."""
    return [name for name in SHOWN if name != attribute]


def heading(shown: Sequence[str]) -> str:
    """The titles above `row`."""
    return f"  {'':18s} FD [95 % interval] hard          success  {' '.join(name[:10] for name in shown)}  change"


def row(way: str, found: Mapping[str, Any], shown: Sequence[str]) -> str:
    """A way's outcome (see `debias.outcome`), with the shares that keep their class."""
    kept = " ".join(f"{100 * found['kept'][name]:{len(name[:10])}.1f}" for name in shown)
    return f"  {measured(way, dict(found))}  {kept}  {found['pixel_change']:.3f}"


def figures(way: str, job: str, size: tuple[int, int], attribute: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs."""
    told = {name: found[name] for name in ("fd", "success", "kept", "pixel_change")}
    return {"way": way, "prompt": job, "size": list(size), "attribute": attribute, **told}


def save_grid(file: Path, ways: Mapping[str, Tensor]) -> None:
    """The first twelve pictures (n x H x W x 3 in [0, 1]) of each way, one row each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [(pictures[:12] * 255).round().byte().numpy() for pictures in ways.values()]
    Image.fromarray(image_grid(rows, list(ways), columns=12)).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--prompts", nargs="+", default=list(ATTRIBUTES["occupation"][1:]))
    parser.add_argument("--grids", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = load_prompted(DENOISER_FILE)
    model, classifier = at_precision(model), load_classifier(CLASSIFIER_FILE)
    began, rows, recipes = time.time(), [], ways(options.controls)
    print(f"n = {options.pictures} a prompt and size, cfg {CFG:g}, seeds from {SEED}, {PRECISION}; shares in %")
    for number, job in enumerate(options.prompts):
        for size in SIZES:
            guidance = everywhere(text, phrase([], job), size, options.pictures)
            seed = SEED + number
            before = Read.of(run(model, options.pictures, None, seed, guidance, size)[0], classifier)
            for attribute, of_attribute in recipes.items():
                print(f"\n{job}, {size[0]} x {size[1]}, {attribute}")
                shown = shown_beside(attribute)
                print(heading(shown))
                for way, recipe in {"before": None, **of_attribute}.items():
                    after, targets = before, None
                    if recipe:
                        drawn, targets = run(model, options.pictures, recipe, seed, guidance, size)
                        after = Read.of(drawn, classifier)
                    found = outcome(ATTRIBUTES[attribute], before, after, attribute, targets)
                    print(row(way, found, shown), flush=True)
                    if way == "SAE recipe" and options.grids:
                        file = options.grids / f"{job}_{size[0]}x{size[1]}_{attribute}.png"
                        save_grid(file, {"before": before.pictures, "after": after.pictures})
                    rows.append(figures(way, job, size, attribute, found))
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
