"""The steering edit alone against the dense edit that goes through all latents.

    python benchmarks/run.py --only steering

The dense edit encodes the whole map, keeps the k largest of every position in a dense N x H x W tensor, scales the
chosen latents and decodes the difference through the whole decoder. Ours with the full SAE gives the same result;
with a recipe the gate is fitted, so only the time is compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from difflens_core.locate import Levels  # noqa: E402
from difflens_core.sae import Normalisation, SparseAutoencoder  # noqa: E402
from difflens_core.steer import Steering, recipe_from_features  # noqa: E402

WIDTH, LATENTS, MAP, K, FEATURES, PICTURES = 512, 4096, 8, 32, 30, 16
SIZE = f"d={WIDTH}, N={LATENTS}, {MAP}x{MAP}, k={K}, {FEATURES} features, {PICTURES} pictures"
REPEATS = 7


def random_sae() -> SparseAutoencoder:
    draw = torch.Generator().manual_seed(0)
    decoder = F.normalize(torch.randn(LATENTS, WIDTH, generator=draw), dim=1)
    zeros = torch.zeros(LATENTS), torch.zeros(WIDTH)
    steps = Normalisation(torch.zeros(1), torch.randn(1, WIDTH, generator=draw), torch.ones(1))
    return SparseAutoencoder(decoder.clone(), zeros[0], decoder, zeros[1], steps, K, "middle_block")


def dense_edit(sae: SparseAutoencoder, h: Tensor, features: Tensor) -> Tensor:
    """h + D (z' - z) with z' = 2 z on `features`, by dense tensors of N x H x W."""
    x = (h - sae.normalisation.mean[0][:, None, None]) / sae.normalisation.scale[0]
    pre = F.conv2d(x, sae.encoder[:, :, None, None], sae.encoder_bias).relu()
    top = pre.topk(sae.k, dim=1)
    z = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
    changed = z.clone()
    changed[:, features] *= 2
    return h + F.conv2d(changed - z, sae.decoder.T[:, :, None, None]) * sae.normalisation.scale[0]


def seconds(function: Callable[[], object]) -> float:
    """Median time of a call, after one that warms up."""
    function()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@torch.inference_mode()
def rows() -> list[dict]:
    """name, size, ours, peer, peer_name, ratio (seconds; ratio = peer / ours)."""
    sae, draw = random_sae(), torch.Generator().manual_seed(1)
    h = torch.randn(PICTURES, WIDTH, MAP, MAP, generator=draw)
    images, features = torch.arange(PICTURES), torch.randperm(LATENTS, generator=draw)[:FEATURES].sort().values
    recipe = recipe_from_features(sae, "any", {"only": features})
    full = Steering(recipe, torch.zeros_like, sae)
    torch.testing.assert_close(full(h, 0.0, images), dense_edit(sae, h, features), atol=1e-4, rtol=1e-4)
    scaled = Steering(replace(recipe, threshold=torch.zeros(FEATURES)), torch.zeros_like)
    levels = torch.rand(1, 2, FEATURES, MAP * MAP, generator=draw)
    two = replace(
        scaled.recipe, classes=("one", "other"), strength=(1.0, 1.0), mode="shift", levels=Levels.of(levels),
        member=torch.ones(2, FEATURES, dtype=torch.bool), probe_weight=torch.randn(1, 2, WIDTH, generator=draw),
        probe_bias=torch.zeros(1, 2),
    )  # fmt: skip
    shifted = Steering(two, lambda pictures: pictures % 2)
    peer = seconds(lambda: dense_edit(sae, h, features))
    ours = {"full SAE, scale": full, "recipe, scale": scaled, "recipe, shift": shifted}
    found = []
    for name, steering in ours.items():
        took = seconds(lambda steering=steering: steering(h, 0.0, images))
        found.append(
            {
                "name": f"steering edit, {name}", "size": SIZE, "ours": took, "peer": peer,
                "peer_name": "dense edit", "ratio": peer / took,
            }
        )  # fmt: skip
    return found
