"""How well an SAE explains activations that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..activations import Activations
from ..files import DiffLensError
from .autoencoder import SparseAutoencoder

VALIDATION_PICTURES = 32  # of those held out, by which training is watched


@dataclass(frozen=True)
class Quality:
    """How well an SAE explains activations.

    fvu: fraction of variance unexplained, ||x - x^||^2 / ||x - mean||^2, in normalised units; l0: active latents a
    position; dead: share of latents that never fired on these activations.
    """

    fvu: float
    l0: float
    dead: float


def hold_out(activations: Activations) -> tuple[Activations, Activations]:
    """The pictures to train on, and the last eighth (at least one) to measure the SAE on."""
    if activations.pictures < 2:
        raise DiffLensError("got one picture, expected at least 2, one to train on and one to measure by.")
    kept = activations.pictures - max(1, activations.pictures // 8)
    return activations.part(0, kept), activations.part(kept, activations.pictures)


@torch.no_grad()
def measure_sae(sae: SparseAutoencoder, activations: Activations) -> Quality:
    """Quality on `activations` (use pictures that the SAE was not trained on), measured where the SAE is."""
    error = variance = active = 0.0
    exact = torch.float32 if sae.device.type == "mps" else torch.float64  # which that device lacks
    fired = torch.zeros(sae.latents, dtype=torch.bool, device=sae.device)
    rows_of_step = activations.pictures * activations.positions // sae.kernel**2
    for s, progress in enumerate(activations.progress):
        step = sae.normalisation.step_at(float(progress))
        total = torch.zeros(sae.width, dtype=exact, device=sae.device)
        for _, values in activations.batches(s):
            rows = sae.rows(values.to(sae.device), step)
            latents = sae.encode_rows(rows, step)
            error += float((rows - sae.decode(latents)).to(exact).square().sum())
            variance += float(rows.to(exact).square().sum())
            total += rows.to(exact).sum(dim=(0, 1))
            active += float((latents.values > 0).sum())
            fired[latents.indices[latents.values > 0]] = True
        variance -= float(total.square().sum()) / rows_of_step
    return Quality(
        error / variance, active / (rows_of_step * len(activations.progress)), 1 - float(fired.float().mean())
    )
