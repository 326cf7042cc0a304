"""What steering costs: steered against unsteered sampling, in pairs that take turns.

    python benchmarks/overhead.py             the avatars
    python benchmarks/overhead.py --sd        a denoising step of Stable Diffusion 1.5 too (random weights, 512 px,
                                              about 4 GB and 5 minutes on 2 cores); needs diffusers

Prints the median over pairs of steered time / unsteered time, and the middle half of the ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from debias import ATTRIBUTES, AVATARS, STEPS, fair_targets

from difflens_core.activations import edit_site
from difflens_core.locate import in_maps
from difflens_core.networks import load_denoiser, sample, start_noise
from difflens_core.sae import Normalisation
from difflens_core.steer import Recipe, Steering, load_recipe, with_settings

BATCH = 16
PAIRS = 15
SD_PAIRS = 7


def paired(name: str, size: str, run: Callable[[bool], object], pairs: int) -> dict:
    """A row for `run(steered)`: median times, and the quartiles of the ratio within a pair."""

    def seconds(steered: bool) -> float:
        began = time.perf_counter()
        run(steered)
        return time.perf_counter() - began

    seconds(True)  # warm up
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for steered in (True, False) if pair % 2 else (False, True):  # neither is always first
            times[steered].append(seconds(steered))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, peer = (statistics.median(times[steered]) for steered in (True, False))
    return {
        "name": name, "size": size, "ours": ours, "peer": peer, "peer_name": "unsteered", "ratio": middle,
        "middle_half": (low, high),
    }  # fmt: skip


def avatars() -> list[dict]:
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    noise = start_noise(BATCH, seed=1)
    found = []
    for attribute in ATTRIBUTES:
        recipe = load_recipe(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")
        recipe = with_settings(recipe, hold=False)  # which draws twice
        steerings = [Steering(recipe, fair_targets(recipe, seed=0).of)]

        def run(steered: bool, steerings=steerings) -> None:
            sample(model, noise, STEPS, steerings if steered else [])

        found.append(paired("steered sampling", f"avatars, {attribute}", run, PAIRS))
    return found


def random_recipe(width: int, positions: int, classes: int = 2, features: int = 60, steps: int = 50) -> Recipe:
    """A recipe of the size that a Stable Diffusion model would have."""
    torch.manual_seed(0)
    normalisation = Normalisation(torch.arange(steps) / steps, torch.zeros(steps, width), torch.ones(steps))
    means = torch.rand(steps, classes, features, positions)
    levels = in_maps(means, means.new_zeros(steps, classes, 0, features, positions), means.new_zeros(steps, 0, width),
                     means.new_zeros(steps, 0), {})  # fmt: skip
    return Recipe(
        "any", tuple("ab"), "mid_block", "", torch.arange(features), torch.randn(features, width),
        torch.zeros(features), torch.zeros(features), torch.randn(features, width),
        torch.ones(classes, features, dtype=torch.bool), levels,
        torch.randn(steps, classes, width), torch.zeros(steps, classes), normalisation, strength=(1.0,) * classes,
    )  # fmt: skip


@torch.inference_mode()
def stable_diffusion() -> dict:
    """One evaluation of the U-Net of Stable Diffusion 1.5 with a conditional and an unconditional row."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
    ).eval()
    latent, prompt = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 768)
    steering = Steering(random_recipe(1280, 64), lambda images: images % 2)

    def edit(h: torch.Tensor) -> torch.Tensor:
        unconditional, conditional = h.chunk(2)
        return torch.cat([unconditional, steering(conditional, 0.5, torch.zeros(1, dtype=torch.int64))])

    def run(steered: bool) -> None:
        if steered:
            with edit_site(model, "mid_block", edit):
                model(latent, 500, prompt)
        else:
            model(latent, 500, prompt)

    return paired("steered step", "SD 1.5, 512 px", run, SD_PAIRS)


def rows(sd: bool = True) -> list[dict]:
    """Rows of `name, size, ours, peer, peer_name, ratio`; here ratio is ours / unsteered. `sd` needs diffusers."""
    found = avatars()
    if sd and importlib.util.find_spec("diffusers"):
        found.append(stable_diffusion())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", action="store_true", help="a step of Stable Diffusion 1.5, too")
    for row in rows(parser.parse_args().sd):
        low, high = row["middle_half"]
        print(f"{row['size']:24} steered / unsteered {row['ratio']:.3f} (middle half {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
