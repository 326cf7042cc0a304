"""Training an SAE: deterministic, resumable, and good at data that are sparse by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError
from difflens_core.sae import TENSORS
from difflens_core.training import (
    TrainingOptions,
    initial_sae,
    learning_rate_share,
    measure_sae,
    reconstruction_loss,
    train_sae,
    training_rows,
)

OPTIONS = TrainingOptions(latents=48, k=3, steps=40, batch=128, dead_after=10, aux_k=8, seed=5)


@pytest.fixture(scope="module")
def sparse(toys) -> Activations:
    """2 steps x 48 pictures x 16 channels x 4 x 4: sums of 3 out of 24 directions at every position."""
    draw = toys.random(0)
    directions = F.normalize(draw(24, 16), dim=1)
    chosen = draw(2, 48, 16, 24).topk(3, dim=-1).indices
    amounts = 1 + draw(2, 48, 16, 3).abs()
    rows = torch.einsum("sbpk,sbpkc->sbcp", amounts, directions[chosen])
    return Activations(rows.reshape(2, 48, 16, 4, 4), torch.tensor([0.0, 0.5]), "middle")


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def test_the_seed_decides_the_weights_to_the_bit(sparse):
    first = train_sae(sparse, OPTIONS)
    assert same(first, train_sae(sparse, OPTIONS))
    assert not same(first, train_sae(sparse, replace(OPTIONS, seed=6)))


@pytest.mark.parametrize("stop", [1, 17, 40, 205])
def test_a_cancelled_training_goes_on_to_the_same_weights(sparse, tmp_path, stop):
    # So many latents that some die on the way.
    options, checkpoint = replace(OPTIONS, latents=192, k=1, steps=max(40, stop + 5)), tmp_path / "sae.pt"

    def cancel(step: int, _loss: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(sparse, options, cancel, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["sae.pt"]
    steps = []
    resumed = train_sae(sparse, options, lambda step, _: steps.append(step), checkpoint)
    assert steps == list(range(stop + 1, options.steps + 1)) and same(resumed, train_sae(sparse, options))
    with pytest.raises(DiffLensError, match="begun with other options"):
        train_sae(sparse, replace(options, lr=1.0), checkpoint=checkpoint)


def test_training_explains_sparse_data_and_keeps_unit_decoder_rows(sparse):
    options = replace(OPTIONS, steps=500, batch=256, lr=1e-2)
    seen, held_out = (
        Activations(sparse.values[:, part], sparse.progress, "middle") for part in (np.s_[:40], np.s_[40:])
    )
    losses = []
    sae = train_sae(seen, options, lambda _, loss: losses.append(loss))
    quality = measure_sae(sae, held_out)
    assert quality.fvu < 0.15 < 0.5 < measure_sae(initial_sae(seen, options), held_out).fvu
    assert len(losses) == 500 and losses[-1] < losses[0] / 3
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48))
    assert quality.l0 <= 3 and not any(getattr(sae, name).requires_grad for name in TENSORS)


def test_a_slice_of_the_pictures_trains_like_its_copy(sparse):
    part = sparse.values[:, 3:20]
    saes = [train_sae(Activations(v, sparse.progress, "middle"), OPTIONS) for v in (part, part.contiguous())]
    for name in TENSORS:
        torch.testing.assert_close(getattr(saes[0], name), getattr(saes[1], name), atol=1e-4, rtol=0)


def test_aux_k_revives_dead_latents_that_are_needed(sparse, tmp_path):
    def quality(aux_k: int):
        """Quality after a training that begins with 12 latents for 24 directions and 36 too quiet to be chosen."""
        options, path = replace(OPTIONS, steps=300, batch=256, lr=3e-3, aux_k=aux_k), tmp_path / f"{aux_k}.pt"
        with pytest.raises(ZeroDivisionError):
            train_sae(sparse, options, lambda *_: 1 / 0, path)
        saved = torch.load(path)
        saved["weights"]["encoder"].data[12:] *= 0.02
        torch.save(saved, path)
        return measure_sae(train_sae(sparse, options, checkpoint=path), sparse)

    without, revived = quality(0), quality(8)
    assert without.dead > 0.6 and revived.dead < without.dead - 0.2 and revived.fvu < without.fvu - 0.05


def test_loss_is_the_fvu_plus_a_32nd_of_the_aux_residual(sparse):
    sae, dead = initial_sae(sparse, OPTIONS), torch.arange(48) % 2 == 0
    x = training_rows(sparse, sae, torch.arange(0, 1500, 31))
    pre, decoder = (x.double() @ sae.encoder.double().T).numpy(), sae.decoder.double().numpy()
    residual, aux = x.double().numpy().copy(), np.zeros(x.shape)
    for i, row in enumerate(pre):
        for n in np.argsort(-row)[:3]:
            residual[i] -= max(row[n], 0) * decoder[n]
        for n in sorted(np.flatnonzero(dead), key=lambda n: -row[n])[:8]:  # noqa: B023
            aux[i] += max(row[n], 0) * decoder[n]
    variance = ((x.double() - x.double().mean(dim=0)) ** 2).sum().item()
    plain, _ = reconstruction_loss(sae, x, torch.zeros(48, dtype=torch.bool), 8)
    live = replace(sae, decoder=sae.decoder.clone().requires_grad_())
    both, _ = reconstruction_loss(live, x, dead, 8)
    assert float(plain) == pytest.approx((residual**2).sum() / variance, rel=1e-5)
    assert float(both.detach() - plain) == pytest.approx(((aux - residual) ** 2).sum() / variance / 32, rel=1e-3)
    (both - reconstruction_loss(live, x, ~dead & dead, 8)[0]).backward()
    moved = live.decoder.grad.abs()
    assert moved[~dead].max() < 1e-6 and moved[dead].max() > 1e-3, "the auxiliary loss is for dead latents only"


def test_training_rows_pick_step_picture_and_position(sparse):
    sae = initial_sae(sparse, OPTIONS)
    rows = training_rows(sparse, sae, torch.tensor([0, (1 * 48 + 7) * 16 + 9]))
    expected = (sparse.values[1, 7, :, 2, 1] - sae.normalisation.mean[1]) / sae.normalisation.scale[1]
    torch.testing.assert_close(rows[1], expected)


def test_rate_warms_up_holds_and_falls():
    share = [learning_rate_share(step, 200) for step in range(200)]
    assert share[0] == pytest.approx(0.1) and max(share) == share[50] == 1 and 0 < share[-1] < 0.02
    assert np.argmin(np.diff(share) >= 0) >= 99


@pytest.mark.parametrize("k", [0, 49])
def test_a_k_beyond_the_latents_is_refused(sparse, k):
    with pytest.raises(DiffLensError, match=f"k is {k}, expected 1 to 48"):
        train_sae(sparse, replace(OPTIONS, k=k))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_with_nan_are_refused(sparse, value):
    values = sparse.values.clone()
    values[1, 2, 3, 0, 0] = value
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        train_sae(Activations(values, sparse.progress, "middle"), OPTIONS)
