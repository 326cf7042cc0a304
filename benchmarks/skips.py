"""On a network with long skips, is one site enough? A small U-Net is trained, and steered at one site and at three.

    python benchmarks/skips.py                     about 25 minutes on 2 cores
    python benchmarks/skips.py --json FILE --grids FOLDER

The network is diffusers' UNet2DModel: skips at every level, noise prediction, 32 x 32 portraits with the avatars' bias.
Presentation is steered with recipes made in the same way at each of three sites, at each alone and joined. Strengths
are the best on tuning seeds; the figures are of fresh seeds. The classifier is the avatars', on pictures made twice as
large. Beside the joined recipe stand the same number of random latents and the mean difference, both at all three
sites at their own best strengths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from debias import AVATARS, Read, fair_targets, in_batches, measured, outcome
from launch_comfyui import install_mends
from PIL import Image
from portraits import ATTRIBUTES, SIZE, render  # found by the path that debias sets
from stages import to_tensor, train_network
from torch import Tensor
from torch.nn import functional as F

from difflens_core.activations import capture
from difflens_core.classifiers import load_classifier
from difflens_core.locate import LabelledPictures, attribute_features, balancing_weights, train_probes
from difflens_core.networks import DiffusersSampler
from difflens_core.report import image_grid
from difflens_core.sae import TrainingOptions, hold_out, measure_sae, train_sae
from difflens_core.steer import Recipe, at_dose, build_recipe, joined, mean_difference, random_features, steerings

install_mends()  # a torchvision built for a GPU beside a CPU build of torch: diffusers imports it
from diffusers import DDIMScheduler, UNet2DModel  # noqa: E402

SIDE, ATTRIBUTE = 32, "presentation"
CLASSES = ATTRIBUTES[ATTRIBUTE]
SITES = ("mid_block", "up_blocks.0.resnets.1", "up_blocks.1.resnets.1")
NETWORK = {"images": 8_000, "steps": 4_000, "batch": 32, "lr": 1e-3, "ema": 0.999, "seed": 41}
CAPTURED, TUNING, FRESH = (768, 6_100), (96, 6_200), (256, 6_300)  # pictures and seed
SAE = TrainingOptions(latents=768, k=24, steps=1_500, batch=2_048, seed=42)
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def network() -> UNet2DModel:
    torch.manual_seed(NETWORK["seed"])
    return UNet2DModel(
        sample_size=SIDE, layers_per_block=1, block_out_channels=(32, 64, 96), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=32,
    )  # fmt: skip


def trained(scheduler: DDIMScheduler, checkpoint: Path) -> UNet2DModel:
    """The network, trained to tell the noise in drawings of the avatars' mix (Ho et al. 2020)."""
    images, _ = render(NETWORK["images"], NETWORK["seed"], False)
    x0 = F.avg_pool2d(to_tensor(images), SIZE // SIDE)
    model, last = network(), scheduler.config.num_train_timesteps

    def loss_at(step: int) -> Tensor:
        clean = x0[torch.randint(len(x0), (NETWORK["batch"],))]
        noise, at = torch.randn_like(clean), torch.randint(last, (len(clean),))
        return F.mse_loss(model(scheduler.add_noise(clean, noise, at), at).sample, noise)

    return train_network(model, loss_at, NETWORK, checkpoint).eval().requires_grad_(False)


def enlarged(drawn: Tensor) -> Tensor:
    """Pictures (n x H x W x 3 in [0, 1]) as large as the classifier knows them."""
    return F.interpolate(drawn.movedim(3, 1), SIZE, mode="bilinear").clamp(0, 1).movedim(1, 3)


def draw(sampler: DiffusersSampler, count: int, seed: int, recipe: Recipe | None = None) -> Tensor:
    """Pictures (n x H x W x 3) of a run, steered to a fair mix by the recipe."""
    noise = torch.randn(count, *sampler.shape, generator=torch.Generator().manual_seed(seed))
    edits = steerings(recipe, fair_targets(recipe, seed).of) if recipe else []

    def part(noise: Tensor, first: int) -> Tensor:
        return sampler.decode(sampler.sample(noise, torch.arange(first, first + len(noise)), edits))

    return enlarged(in_batches(noise, part))


def ways(sampler: DiffusersSampler, classifier, folder: Path) -> dict[str, Recipe]:
    """The recipe of each site, all of them joined, and the controls."""
    count, seed = CAPTURED
    store = capture(sampler, count, seed, 64, SITES, folder=folder)
    read = classifier.classify(enlarged(torch.cat([sampler.decode(x) for x in store.samples().split(64)])))
    labels = {name: of.argmax(dim=1) for name, of in read.items()}
    others = {name: (classifier.attributes[name], of) for name, of in labels.items() if name != ATTRIBUTE}
    weights = balancing_weights(labels[ATTRIBUTE], [of for _, of in others.values()])
    own: dict[str, list[Recipe]] = {"SAE": [], "random latents": [], "mean difference": []}
    for number, site in enumerate(SITES):
        activations = store.activations(site)
        train, held_out = hold_out(activations)
        sae = train_sae(train, SAE)
        quality = measure_sae(sae, held_out)
        size = " x ".join(map(str, (activations.width, *activations.map)))
        print(f"{site}: {size}, FVU {quality.fvu:.3f}, dead {quality.dead:.3f}", flush=True)
        probes = train_probes(activations, sae, labels[ATTRIBUTE], ATTRIBUTE, CLASSES)
        found = attribute_features(activations, sae, probes, labels[ATTRIBUTE], weights=weights)
        recipe = build_recipe(
            found, sae, probes, activations, labels[ATTRIBUTE], others, 120, sampler.fingerprint
        )  # fmt: skip
        own["SAE"].append(joined(recipe))
        own["random latents"].append(joined(random_features(recipe, sae, seed=number)))
        seen = LabelledPictures(activations, labels[ATTRIBUTE], others)
        own["mean difference"].append(joined(mean_difference(recipe, [seen])))
    single = {f"SAE at {recipe.site}": recipe for recipe in own["SAE"]}
    return single | {f"{way}, all three": joined(*recipes) for way, recipes in own.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grids", type=Path, help="folder for pictures before and after")
    parser.add_argument("--work", type=Path, help="folder to keep the network and the capture in, for a second run")
    options = parser.parse_args()
    began, rows = time.time(), []
    folder = options.work or Path(tempfile.mkdtemp())
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    sampler = DiffusersSampler(trained(scheduler, folder / "network.pt"), scheduler, 20)
    classifier = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    recipes = ways(sampler, classifier, folder / "capture")
    tuning, before = (Read.of(draw(sampler, *run), classifier) for run in (TUNING, FRESH))
    print(f"{time.time() - began:.0f} seconds so far; n = {FRESH[0]}, kept in %")
    print(f"{'':38} strength  {'':18s} FD [95 % interval] hard          success  kept  change")
    for way, recipe in {"before": None, **recipes}.items():
        dose, after, targets = 0.0, before, None
        if recipe:
            tried = {}
            for strength in STRENGTHS:
                drawn = Read.of(draw(sampler, *TUNING, at_dose(recipe, strength)), classifier)
                tried[strength] = outcome(CLASSES, tuning, drawn, ATTRIBUTE, fair_targets(recipe, TUNING[1]))
            told = ", ".join(f"{s:g}: {of['success']:.2f}" for s, of in tried.items())
            print(f"  {way}: success by strength {told}", flush=True)
            dose = max(tried, key=lambda strength: (tried[strength]["success"], -strength))
            after = Read.of(draw(sampler, *FRESH, at_dose(recipe, dose)), classifier)
            targets = fair_targets(recipe, FRESH[1])
        found = outcome(CLASSES, before, after, ATTRIBUTE, targets)
        kept = sum(found["kept"].values()) / len(found["kept"])
        print(f"{way:38} {dose:8g}  {measured('', found)}  {100 * kept:4.1f}  {found['pixel_change']:.3f}", flush=True)
        rows.append({"way": way, "strength": dose, "fd": found["fd"], "success": found["success"], "kept": kept})
        if options.grids and recipe:
            options.grids.mkdir(parents=True, exist_ok=True)
            shown = [(of.pictures[:12] * 255).round().byte().numpy() for of in (before, after)]
            Image.fromarray(image_grid(shown, ["before", "after"], columns=12)).save(options.grids / f"{way}.png")
    print(f"{time.time() - began:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
