"""Separation of classes by single numbers, against pairs counted one by one."""

from __future__ import annotations

import pytest
import torch

from difflens_core.files import DiffLensError
from difflens_core.locate import measure_separation
from difflens_core.locate.separation import auc, best_auc, folds, pooled


def test_auc_is_the_share_of_pairs_in_order():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).round(decimals=0)  # with ties
    positive = torch.arange(20) % 3 == 0
    for column, found in enumerate(auc(x, positive)):
        pairs = [(a, b) for a in x[positive, column].tolist() for b in x[~positive, column].tolist()]
        assert found == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))


def test_every_fold_holds_out_a_quarter_of_every_class():
    labels = torch.tensor([0] * 8 + [1] * 5)
    held = torch.stack(folds(labels)).int()
    assert held.sum(dim=0).tolist() == [1] * 13
    assert [row[:8].sum().item() for row in held] == [2] * 4 and all(1 <= row[8:].sum() <= 2 for row in held)


def test_a_column_that_tells_a_class_either_way_is_found_and_noise_is_chance():
    labels = torch.arange(80) % 2
    noise = torch.randn(80, 30, generator=torch.Generator().manual_seed(2))
    assert best_auc(noise, labels) == pytest.approx(0.5, abs=0.15)
    for sign in (1, -1):
        told = torch.cat([noise, sign * (labels[:, None] + 0.01 * noise[:, :1])], dim=1)
        assert best_auc(told, labels) == 1


def test_pooled_latents_are_the_means_of_dense_ones(toys):
    sae, activations = toys.sae(), toys.activations()
    raw, latents = pooled(sae, activations)
    dense, rows = torch.zeros(12, 20), torch.zeros(12, 6)
    for step in range(3):
        x = sae.rows(activations.values[step], step)
        pre = x @ sae.encoder.T + sae.encoder_bias
        kth = pre.sort(dim=-1, descending=True).values[..., sae.k - 1 : sae.k]
        dense += torch.where(pre >= kth, pre, 0).relu().mean(dim=1) / 3
        rows += x.mean(dim=1) / 3
    torch.testing.assert_close(latents, dense)
    torch.testing.assert_close(raw, rows)


def test_labels_that_do_not_fit_are_refused(toys):
    with pytest.raises(DiffLensError, match="11 labels for 12 captured pictures"):
        measure_separation(toys.sae(), toys.activations(), torch.zeros(11).long(), "age", ("a", "b"), torch.arange(3))
