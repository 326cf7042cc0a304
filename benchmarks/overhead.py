"""What steering costs: steered against unsteered sampling of the avatars, in pairs that take turns.

    python benchmarks/overhead.py

Prints the median over pairs of steered time / unsteered time, and the middle half of the ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
from debias import ATTRIBUTES, AVATARS, STEPS, fair_targets

from difflens_core.denoiser import load_denoiser
from difflens_core.recipes import load_recipe
from difflens_core.sampling import sample, start_noise
from difflens_core.steering import Steering

BATCH = 16
PAIRS = 15


def seconds(model, noise: torch.Tensor, steerings: list[Steering]) -> float:
    began = time.perf_counter()
    sample(model, noise, STEPS, steerings)
    return time.perf_counter() - began


def main() -> None:
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    noise = start_noise(BATCH, seed=1)
    for attribute in ATTRIBUTES:
        recipe = load_recipe(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")
        steering = [Steering(recipe, fair_targets(recipe, seed=0).of)]
        seconds(model, noise, steering)  # warm up
        ratios = []
        for pair in range(PAIRS):
            runs = [steering, []] if pair % 2 else [[], steering]  # neither is always first
            times = {bool(run): seconds(model, noise, run) for run in runs}
            ratios.append(times[True] / times[False])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{attribute:14s} steered / unsteered {middle:.3f} (middle half {low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
