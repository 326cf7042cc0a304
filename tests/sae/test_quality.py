"""The quality of an SAE, against dense sums."""

from __future__ import annotations

import pytest
import torch

from difflens_core.sae import measure_sae


def test_quality_equals_dense_sums(toys):
    sae, activations = toys.sae(latents=60), toys.activations()
    error = variance = 0.0
    codes = []
    for s, values in enumerate(activations.values):
        x = ((values.movedim(1, -1) - sae.normalisation.mean[s]) / sae.normalisation.scale[s]).flatten(0, 2)
        pre = x @ sae.encoder.T + sae.encoder_bias
        codes.append(torch.where(pre >= pre.sort(dim=1).values[:, -4:-3], pre.relu(), 0))
        error += float(((x - codes[s] @ sae.decoder - sae.decoder_bias) ** 2).sum())
        variance += float(((x - x.mean(dim=0)) ** 2).sum())
    active = torch.cat(codes) > 0
    found = measure_sae(sae, activations)
    expected = [error / variance, active.sum() / len(active), 1 - active.any(dim=0).float().mean()]
    assert [found.fvu, found.l0, found.dead] == pytest.approx([float(x) for x in expected], rel=1e-4)
    assert found.dead > 0
