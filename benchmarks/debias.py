"""Does the method do what it says on the avatars? Fairness before and after steering.

    python benchmarks/debias.py                    512 pictures per attribute
    python benchmarks/debias.py --controls         beside random latents and the raw mean difference
    python benchmarks/debias.py --json FILE        the same numbers for machines

The seed is one on which no strength was tuned. All runs of an attribute start from the same noise, so that pictures
are paired: `kept` is the share whose other attributes, hair colour, background and clothes read as before. The
controls are fitted on pictures that are drawn first, which takes minutes. The first line says whether the model ran in
bf16 or fp32 (see precision.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models" / "making"), str(ROOT / "scripts")]

from precision import PRECISION, at_precision  # noqa: E402

from difflens_core.activations import Edit  # noqa: E402
from difflens_core.classifiers import AttributeClassifier, load_classifier  # noqa: E402
from difflens_core.measure import kept_attributes, measure_fairness, pixel_change  # noqa: E402
from difflens_core.networks import Denoiser, DenoiserSampler, Guidance, load_denoiser, start_noise  # noqa: E402
from difflens_core.steer import Recipe, Steering  # noqa: E402
from difflens_core.targets import Targets, parse_target  # noqa: E402

AVATARS = ROOT / "models" / "avatars"
ATTRIBUTES = ("presentation", "age", "skin_tone")
NUISANCES = ("hair_colour", "background", "clothes")
SEED = 90_001
STEPS = 20
BATCH = 64


def fair_targets(recipe: Recipe, seed: int) -> Targets:
    """Classes dealt out in equal shares."""
    return Targets(recipe.attribute, recipe.classes, tuple(parse_target("uniform", recipe.classes)), seed)


def in_batches(noise: Tensor, draw: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pictures of all the noise, `draw(some noise, number of its first)` at a time."""
    return torch.cat([draw(part, i * BATCH) for i, part in enumerate(noise.split(BATCH))])


def draw_all(model: Denoiser, noise: Tensor, edits: Sequence[Edit], guidance: Guidance | None) -> Tensor:
    """Pictures (n x 3 x H x W in [-1, 1]) of all the noise, under edits of the model's activations if there are any."""
    sampler = DenoiserSampler(model, STEPS, guidance)
    return in_batches(noise, lambda part, first: sampler.sample(part, torch.arange(first, first + len(part)), edits))


def to_images(drawn: Tensor) -> Tensor:
    """n x 3 x H x W in [-1, 1] to n x H x W x 3 in [0, 1]."""
    return drawn.movedim(1, -1) / 2 + 0.5


def run(
    model: Denoiser, count: int, recipe: Recipe | None = None, seed: int = SEED, guidance: Guidance | None = None,
    size: tuple[int, int] = (64, 64),
) -> tuple[Tensor, Targets | None]:  # fmt: skip
    """Pictures (n x H x W x 3 in [0, 1]) of a height and width, and the classes they were asked to show."""
    targets = recipe and fair_targets(recipe, seed)
    steerings = [Steering(recipe, targets.of)] if recipe else []
    return to_images(draw_all(model, start_noise(count, seed, *size), steerings, guidance)), targets


@dataclass(frozen=True)
class Read:
    """Pictures (n x H x W x 3 in [0, 1]) and what the classifier sees in them (n x K of every attribute)."""

    pictures: Tensor
    seen: Mapping[str, Tensor]

    @classmethod
    def of(cls, pictures: Tensor, classifier: AttributeClassifier) -> Read:
        return cls(pictures, classifier.classify(pictures))

    def where(self, chosen: Tensor) -> Read:
        """Those that are chosen (n, bool)."""
        return Read(self.pictures[chosen], {name: values[chosen] for name, values in self.seen.items()})

    def shown(self, attribute: str) -> Tensor:
        """The class (n, int64) that each shows."""
        return self.seen[attribute].argmax(dim=1)


def outcome(classes: tuple[str, ...], before: Read, after: Read, attribute: str, targets: Targets | None) -> dict:
    """Fairness of `after`, success, what was kept and how much the pictures changed."""
    asked = targets.first(len(after.pictures)) if targets else None
    report = measure_fairness(
        after.seen[attribute].numpy(), parse_target("uniform", classes), attribute, classes, asked
    )
    return asdict(report) | {
        "kept": kept_attributes(before.seen, after.seen, attribute),
        "pixel_change": pixel_change(before.pictures.numpy(), after.pictures.numpy()),
    }


def measured(name: str, result: dict) -> str:
    """What every table begins with: name, FD with interval, FD of counts, success."""
    success = "  -  " if result["success"] is None else f"{result['success']:.3f}"
    low, high = result["fd_ci"]
    fd = f"{result['fd']:.3f} [{low:.3f}, {high:.3f}] {result['fd_hard']:.3f}"
    return f"{name:18s} {fd:28s}  {success}"


def row(name: str, result: dict) -> str:
    kept = result["kept"]
    others = " ".join(f"{100 * kept[key]:5.1f}" for key in kept if key in ATTRIBUTES)
    nuisance = " ".join(f"{100 * kept[key]:5.1f}" for key in NUISANCES)
    return f"{measured(name, result)}  {others:11s}  {nuisance}  {result['pixel_change']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from make_avatars import ways  # here, for it draws by what is above

    model = at_precision(load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors"))
    classifier = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    began, compared = time.time(), ways(options.controls)
    before = Read.of(run(model, options.pictures)[0], classifier)
    results: dict[str, dict] = {}
    print(f"n = {options.pictures}, {STEPS} steps, seed {SEED}, {PRECISION}; kept and others in %")
    for attribute in ATTRIBUTES:
        others = [name for name in ATTRIBUTES if name != attribute]
        kept = " ".join([*others, *NUISANCES])
        print(f"\n{attribute:18s} FD [95 % interval] hard        success  {kept}  change")
        classes = classifier.attributes[attribute]
        results[attribute] = {"before": outcome(classes, before, before, attribute, None)}
        print(row("before", results[attribute]["before"]), flush=True)
        for name, recipe in compared[attribute].items():
            steered, targets = run(model, options.pictures, recipe)
            after = Read.of(steered, classifier)
            results[attribute][name] = outcome(classes, before, after, attribute, targets)
            print(row(name, results[attribute][name]), flush=True)
    print(f"\n{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
