"""Integrated Gradients of a batch of pictures: ours in one pass, captum's, and a plain autograd loop.

    python benchmarks/run.py --only attribution

captum (an optional package) and the loop get fewer pictures; their time is scaled to the whole batch. The loop is the
left Riemann sum of 10 points, as the method was published. The rows on the completeness error hold no seconds: they
compare the largest |sum of IG - (p(1) - p(0))|.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from steering import LATENTS, MAP, WIDTH, K, random_sae, seconds
from torch import Tensor

from difflens_core.locate import Probes, integrated_gradients
from difflens_core.sae import Latents, SparseAutoencoder

PICTURES, PEER_PICTURES, CLASSES, POINTS = 64, 4, 3, 10
SIZE = f"{PICTURES} pictures, d={WIDTH}, N={LATENTS}, {MAP}x{MAP}, k={K}; peers on {PEER_PICTURES}, scaled"


def probability(z: Tensor, target: Tensor, sae: SparseAutoencoder, probes: Probes) -> Tensor:
    """Softmax of the probe at class `target` (B) for dense latents z (B x P x N)."""
    return probes.logits(z @ sae.decoder + sae.decoder_bias, 0).softmax(dim=1).gather(1, target[:, None])[:, 0]


def riemann_loop(z: Tensor, target: Tensor, sae: SparseAutoencoder, probes: Probes) -> Tensor:
    """IG by a left Riemann sum: POINTS forward and backward passes."""
    total = torch.zeros_like(z)
    for point in range(POINTS):
        at = (z * (point / POINTS)).requires_grad_()
        (slope,) = torch.autograd.grad(probability(at, target, sae, probes).sum(), at)
        total += slope
    return total * z / POINTS


def rows() -> list[dict]:
    """name, size, ours, peer, peer_name, ratio (seconds, but for the completeness error; ratio = peer / ours)."""
    sae, draw = random_sae(), torch.Generator().manual_seed(2)
    h = torch.randn(PICTURES, WIDTH, MAP, MAP, generator=draw) * 1.5
    target = torch.randint(CLASSES, (PICTURES,), generator=draw)
    weight, one = torch.randn(1, CLASSES, WIDTH, generator=draw), torch.ones(1)
    probes = Probes(weight / 4, torch.zeros(1, CLASSES), one, one, "any", ("a", "b", "c"))
    latents = sae.encode(h, 0)
    few = Latents(*(part[:PEER_PICTURES] for part in latents))
    z = torch.zeros(PEER_PICTURES, MAP * MAP, LATENTS).scatter_(-1, few.indices, few.values)

    def gap(ig: Tensor) -> float:
        """Completeness error, measured alike for all."""
        ends = (probability(end, target[:PEER_PICTURES], sae, probes) for end in (z, torch.zeros_like(z)))
        return float((ig.sum(dim=(1, 2)) - next(ends) + next(ends)).abs().max())

    def ours(found: Latents = latents) -> Tensor:
        return integrated_gradients(found, sae, probes, 0, target[: len(found.values)])[0]

    peers = {f"autograd loop, {POINTS}-point Riemann": lambda: riemann_loop(z, target[:PEER_PICTURES], sae, probes)}
    if find_spec("captum"):
        from captum.attr import IntegratedGradients

        captum = IntegratedGradients(lambda z, target: probability(z, target, sae, probes))
        peers[f"captum, {POINTS}-point Gauss-Legendre"] = lambda: captum.attribute(
            z, additional_forward_args=target[:PEER_PICTURES], n_steps=POINTS, method="gausslegendre"
        )
    took, found = seconds(ours), []
    for name, peer in peers.items():
        pairs = {
            "Integrated Gradients": (took, seconds(peer) * PICTURES / PEER_PICTURES),
            "Integrated Gradients, completeness error": (gap(ours(few)), gap(peer())),
        }
        found += [
            {"name": what, "size": SIZE, "ours": mine, "peer": other, "peer_name": name, "ratio": other / mine}
            for what, (mine, other) in pairs.items()
        ]
    return found
