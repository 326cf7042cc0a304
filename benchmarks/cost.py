"""What the way to a recipe costs at the size of SD 1.5, SDXL and Flux: main memory, disk and time, stage by stage.

    python benchmarks/cost.py                  all three, about 15 minutes on 2 cores
    python benchmarks/cost.py --only SDXL --json FILE

Random activations of the true width and map at a site of which SAEs were published, with an SAE of as many latents.
Activations are captured as the pack captures them, one position in each of at most 256 cells of a map. Each stage runs
on a few pictures and steps from a store on disk; seconds are scaled to 1000 pictures of 30 steps, in
which all of them are linear. Memory is the most that the process holds beyond what it held before the stage (see
capture.py) and does not hang on the number of pictures. The steered step is one picture's edit alone; beside it stands
the unsteered step's floating point operations over what this machine does a second in a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from capture import Peak, anonymous
from torch.nn import functional as F

from difflens_core.activations import FINEST, SAMPLES, Activations, Index, coarse, record
from difflens_core.activations.store import SIZE
from difflens_core.locate import attribute_features, train_probes
from difflens_core.sae import SparseAutoencoder, TrainingOptions, fit_normalisation, train_sae
from difflens_core.steer import Steering, build_recipe

PICTURES, STEPS, TRAINED = 32, 2, 20
WHOLE = 1000 * 30  # pictures times steps
TRAINING = 3000  # steps


@dataclass(frozen=True)
class Shape:
    """A site: channels, side of its map, latents and k of a published SAE, and teraflops of the model's step."""

    name: str
    site: str
    width: int
    side: int
    latents: int
    k: int
    teraflops: float


SHAPES = (
    Shape("SD 1.5, 512 px", "up_blocks.1.attentions.1", 1280, 16, 20_480, 32, 0.80),
    Shape("SDXL, 1024 px", "down_blocks.2.attentions.1", 1280, 32, 5_120, 10, 6.76),
    Shape("Flux, 1024 px", "transformer_blocks.18", 3072, 64, 12_288, 32, 110.0),
)
CLASSES = ("a", "b")
OTHERS = {"third": ("a", "b", "c"), "fourth": ("a", "b", "c", "d"), "second": ("a", "b")}


def captured(shape: Shape, pictures: int, folder: Path) -> Activations:
    """Activations of a store in `folder`: noise, and what moves with the picture's class."""
    index = Index((shape.site,), tuple(i / STEPS for i in range(STEPS)), pictures, 4, 0, "stub", cells=FINEST)
    size = (shape.side, shape.side)
    direction = torch.randn(shape.width, generator=torch.Generator().manual_seed(1))

    def draw(first: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(first)
        h = torch.randn(STEPS, len(noise), *coarse(size, FINEST), shape.width, generator=draws)
        sign = (torch.arange(first, first + len(noise)) % 2 * 2 - 1)[:, None, None, None]
        told = {} if coarse(size, FINEST) == size else {f"{shape.site}{SIZE}": torch.tensor(size)}
        return {shape.site: (h + 0.3 * sign * direction).half(), SAMPLES: noise} | told

    noises = (torch.zeros(len(index.pictures_of(shard)), 1) for shard in range(index.shards))
    return record(index, noises, draw, folder).activations()


def random_sae(shape: Shape, activations: Activations) -> SparseAutoencoder:
    directions = F.normalize(torch.randn(shape.latents, shape.width, generator=torch.Generator().manual_seed(2)), dim=1)
    zeros = torch.zeros(shape.latents), torch.zeros(shape.width)
    normalisation = fit_normalisation(activations)
    return SparseAutoencoder(directions, zeros[0], directions, zeros[1], normalisation, shape.k, shape.site)


def stages(shape: Shape, folder: Path) -> list[dict[str, Any]]:
    """Rows `stage, shape, extra_mb, seconds, disk_mb, of`: seconds of the whole, and what that is."""
    found: list[dict[str, Any]] = []

    def measured(stage: str, run: Callable[[], Any], times: float, of: str, disk: float = 0.0) -> Any:
        before, began = anonymous(), time.perf_counter()
        with Peak() as peak:
            result = run()
        took = (time.perf_counter() - began) * times
        found.append({
            "stage": stage, "shape": shape.name, "extra_mb": peak.value - before, "seconds": took, "disk_mb": disk,
            "of": of,
        })  # fmt: skip
        print(f"{shape.name:16} {stage:20} {peak.value - before:8.0f} MB {took:10.1f} s  {disk:8.0f} MB disk  {of}")
        return result

    scale = WHOLE / (PICTURES * STEPS)
    disk = WHOLE * shape.width * math.prod(coarse((shape.side, shape.side), FINEST)) * 2 / 2**20
    many = "1000 pictures x 30 steps"
    measured("capture, a quarter", lambda: captured(shape, PICTURES // 4, folder / "few"), 4 * scale, many, disk)
    activations = measured("capture", lambda: captured(shape, PICTURES, folder / "all"), scale, many, disk)
    options = TrainingOptions(latents=shape.latents, k=shape.k, steps=TRAINED, batch=4096)
    measured("train SAE", lambda: train_sae(activations, options), TRAINING / TRAINED, f"{TRAINING} steps of 4096 rows")
    sae, labels = random_sae(shape, activations), torch.arange(PICTURES) % 2
    others = {name: (classes, torch.arange(PICTURES) // 2 % len(classes)) for name, classes in OTHERS.items()}
    probes = measured("probes", lambda: train_probes(activations, sae, labels, "first", CLASSES), scale, many)
    scores = measured("attribution", lambda: attribute_features(activations, sae, probes, labels), scale, many)
    recipe = measured(
        "recipe", lambda: build_recipe(scores, sae, probes, activations, labels, others, 120), scale, many
    )
    steering, h = Steering(recipe, torch.Tensor.long), torch.randn(1, shape.width, shape.side, shape.side)
    steering(h, 0.5, torch.zeros(1))
    measured("steered step", lambda: [steering(h, 0.5, torch.ones(1)) for _ in range(20)], 1 / 20, "1 picture")
    step = shape.teraflops / speed()
    ratio = 1 + found[-1]["seconds"] / step
    found.append({
        "stage": "steered / unsteered", "shape": shape.name, "extra_mb": 0.0, "seconds": ratio, "disk_mb": 0.0,
        "of": f"an unsteered step computed as {step:.1f} s",
    })  # fmt: skip
    print(f"{shape.name:16} steered / unsteered: {ratio:.4f} (an unsteered step computed as {step:.1f} s)", flush=True)
    return found


def speed() -> float:
    """Teraflops a second of this machine in a large matrix product, fp32."""
    a = torch.randn(2048, 2048)
    a @ a
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 2048**3 / (time.perf_counter() - began) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the beginning of a shape's name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        if not options.only or shape.name.startswith(options.only):
            with tempfile.TemporaryDirectory() as folder:
                rows += stages(shape, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
