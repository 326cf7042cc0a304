"""The loss of a batch and its gradients, against dense latents in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.sae import TrainingOptions, initial_sae
from difflens_core.sae.autoencoder import TENSORS
from difflens_core.sae.loss import BatchLoss, batch_top_k
from difflens_core.sae.training import training_rows

OPTIONS = TrainingOptions(latents=48, k=3, steps=40, batch=128, dead_after=10, aux_k=8, seed=5)


def dense_loss(weights: dict, rows, dead, options: TrainingOptions):
    """FVU + AuxK with dense latents and masks, differentiable."""
    pre = rows @ weights["encoder"].T + weights["encoder_bias"]
    if options.activation == "topk":
        on = pre >= pre.topk(options.k, dim=1).values[:, -1:]
    else:
        on = pre >= pre.flatten().topk(options.k * len(rows)).values[-1]
    residual = rows - (pre * on).relu() @ weights["decoder"] - weights["decoder_bias"]
    variance = (rows - rows.mean(dim=0)).square().sum()
    among = torch.where(dead, pre, -torch.inf)
    chosen = (among >= among.topk(options.aux_k, dim=1).values[:, -1:]) & dead
    aux = torch.where(chosen, pre, 0.0).relu() @ weights["decoder"]
    return (residual.square().sum() + (aux - residual.detach()).square().sum() / 32) / variance, on & (pre > 0)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_dense_float64_latents(sparse, activation, precision):
    options = replace(OPTIONS, activation=activation, precision=precision)
    sae, dead = initial_sae(sparse, options), torch.arange(48) % 2 == 0
    rows = training_rows(sparse, sae, torch.arange(0, 1500, 31))
    if precision == "bf16":  # a choice of latents that rounding cannot change
        rows, sae = rows.bfloat16().float(), replace(sae, encoder=sae.encoder.bfloat16().float())
        options = replace(options, k=48, aux_k=24)
    module = BatchLoss(sae, options)
    loss, fired, _ = module(rows, dead)
    loss.backward()
    weights = {name: getattr(sae, name).double().requires_grad_() for name in TENSORS}
    expected, on = dense_loss(weights, rows.double(), dead, options)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(fired, on.any(dim=0))
    for name in TENSORS:
        torch.testing.assert_close(getattr(module, name).grad.double(), weights[name].grad, atol=1e-5, rtol=1e-4)


def test_batch_top_k_finds_the_largest_even_in_a_row_of_winners():
    pre = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    pre[3] += 10
    active = batch_top_k(pre, 7)
    found = torch.zeros_like(pre).index_put_((active.rows(), active.indices), active.values)
    assert torch.equal(found, torch.where(pre >= pre.flatten().sort().values[-42], pre, 0).relu())
    assert len(active.values) == 42
