"""Training a TopK SAE on captured activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activations
from .files import DiffLensError
from .sae import TENSORS, Latents, SparseAutoencoder, fit_normalisation, sparse_decode, top_k


@dataclass(frozen=True)
class TrainingOptions:
    """latents: N; k: active latents a position; steps: optimiser steps of `batch` positions; lr: peak learning rate.

    aux_k: dead latents that explain the residual; dead_after: steps without firing after which a latent is dead.
    """

    latents: int = 2048
    k: int = 32
    steps: int = 2000
    batch: int = 2048
    lr: float = 1e-3
    aux_k: int = 64
    dead_after: int = 100
    seed: int = 0


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
    train, held_out = activations.values.tensor_split([kept], dim=1)
    return replace(activations, values=train), replace(activations, values=held_out)


def training_rows(activations: Activations, sae: SparseAutoencoder, picks: Tensor) -> Tensor:
    """Normalised rows (len(picks) x C) of the flat (step, picture, position) indices `picks`."""
    _, b, _, height, width = activations.values.shape
    positions = height * width
    step, picture = picks // (b * positions), picks // positions % b
    rows = activations.values.flatten(3)[step, picture, :, picks % positions].float()
    return (rows - sae.normalisation.mean[step]) / sae.normalisation.scale[step, None]


def initial_sae(activations: Activations, options: TrainingOptions) -> SparseAutoencoder:
    """Untrained SAE: random unit directions, the encoder equal to the decoder."""
    if not 1 <= options.k <= options.latents:
        raise DiffLensError(f"Train SAE: k is {options.k}, expected 1 to {options.latents}, the number of latents.")
    if not torch.isfinite(activations.values).all():
        raise DiffLensError("Train SAE: the activations hold NaN or infinite numbers. Check the model's precision.")
    generator = torch.Generator().manual_seed(options.seed)
    decoder = F.normalize(torch.randn(options.latents, activations.width, generator=generator), dim=1)
    zeros = torch.zeros(options.latents), torch.zeros(activations.width)
    normalisation = fit_normalisation(activations.values, activations.progress)
    return SparseAutoencoder(decoder.clone(), zeros[0], decoder, zeros[1], normalisation, options.k, activations.site)


def reconstruction_loss(sae: SparseAutoencoder, rows: Tensor, dead: Tensor, aux_k: int) -> tuple[Tensor, Tensor]:
    """FVU of the batch plus the AuxK loss (Gao et al. 2024, A.2), and which latents fired (N, bool)."""
    pre = F.linear(rows, sae.encoder, sae.encoder_bias)
    latents = top_k(pre, sae.k)
    residual = rows - sae.decode(latents)
    variance = (rows - rows.mean(dim=0)).square().sum()
    loss = residual.square().sum() / variance
    aux_k = min(aux_k, int(dead.sum()))
    if aux_k:
        candidates = torch.where(dead, pre, -torch.inf).topk(aux_k, dim=-1)
        revived = sparse_decode(Latents(candidates.values.relu(), candidates.indices), sae.decoder)
        loss = loss + (revived - residual.detach()).square().sum() / variance / 32
    fired = torch.zeros_like(dead)
    fired[latents.indices[latents.values > 0]] = True
    return loss, fired


def train_sae(
    activations: Activations,
    options: TrainingOptions = TrainingOptions(),
    on_step: Callable[[int, float], None] = lambda step, fvu: None,
    checkpoint: Path | None = None,
) -> SparseAutoencoder:
    """Train a TopK SAE with Adam (warm-up, linear decay, clipped gradients, unit decoder rows).

    `on_step(step, loss)` is called after every optimiser step and may raise to cancel. With `checkpoint`, state is
    saved there every 200 steps and on cancel, and an existing file is gone on from, with the same result.
    """
    sae = initial_sae(activations, options)
    weights = {name: getattr(sae, name).clone().requires_grad_() for name in TENSORS}
    sae = replace(sae, **weights)
    optimiser = torch.optim.Adam(weights.values(), lr=options.lr, betas=(0.9, 0.999), fused=True)
    idle = torch.zeros(options.latents, dtype=torch.int64)
    state = {"options": repr(options), "step": 0}
    if checkpoint and checkpoint.exists():
        state = load_checkpoint(checkpoint, options, weights, optimiser, idle)

    def save() -> None:
        if checkpoint:
            parts = {"weights": weights, "optimiser": optimiser.state_dict(), "idle": idle}
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(state | parts, temporary)
            temporary.replace(checkpoint)

    rows_in_all = activations.values[:, :, 0].numel()
    try:
        for step in range(state["step"], options.steps):
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
            rows = training_rows(activations, sae, torch.randint(rows_in_all, (options.batch,), generator=generator))
            for group in optimiser.param_groups:
                group["lr"] = options.lr * learning_rate_share(step, options.steps)
            loss, fired = reconstruction_loss(sae, rows, idle > options.dead_after, options.aux_k)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimiser.step()
            with torch.no_grad():
                weights["decoder"].copy_(F.normalize(weights["decoder"], dim=1))
            idle.add_(1).masked_fill_(fired, 0)
            state["step"] = step + 1
            on_step(step + 1, loss.item())
            if (step + 1) % 200 == 0:
                save()
    except BaseException:
        save()
        raise
    trained = {name: weight.detach() for name, weight in weights.items()}
    return replace(sae, **trained, info={"training": {**vars(options), "pictures": activations.pictures}})


def load_checkpoint(path: Path, options: TrainingOptions, weights: dict, optimiser, idle: Tensor) -> dict:
    """Fill weights, optimiser and idle counts from `path`; returns the step. Refuses other training options."""
    saved = torch.load(path, weights_only=True)
    if saved["options"] != repr(options):
        raise DiffLensError(f"{path.name}: was begun with other options ({saved['options']}). Delete it or use those.")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved["weights"][name])
    optimiser.load_state_dict(saved["optimiser"])
    idle.copy_(saved["idle"])
    return {"options": saved["options"], "step": saved["step"]}


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, linear decay over the last half."""
    return min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / max(1, steps // 2))


@torch.no_grad()
def measure_sae(sae: SparseAutoencoder, activations: Activations) -> Quality:
    """Quality on `activations` (use pictures that the SAE was not trained on)."""
    error = variance = active = 0.0
    fired = torch.zeros(sae.latents, dtype=torch.bool)
    for values, progress in zip(activations.values, activations.progress, strict=True):
        step = sae.normalisation.step_at(float(progress))
        rows = sae.rows(values, step)
        latents = sae.encode(values, step)
        error += float((rows - sae.decode(latents)).double().square().sum())
        variance += float((rows - rows.mean(dim=(0, 1))).double().square().sum())
        active += float((latents.values > 0).sum())
        fired[latents.indices[latents.values > 0]] = True
    positions = activations.values[:, :, 0].numel() // sae.kernel**2
    return Quality(error / variance, active / positions, 1 - float(fired.float().mean()))
