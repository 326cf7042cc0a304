"""Training an SAE: deterministic, resumable, and good at data that are sparse by construction."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from difflens_core.activations import SAMPLES, Activations, Index, record
from difflens_core.files import DiffLensError
from difflens_core.sae import TrainingOptions, initial_sae, learning_rate_share, load_sae, measure_sae, train_sae
from difflens_core.sae.autoencoder import TENSORS
from difflens_core.sae.training import training_rows

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = TrainingOptions(latents=48, k=3, steps=40, batch=128, dead_after=10, aux_k=8, seed=5)


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

    def cancel(step: int, *_: object) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(sparse, options, cancel, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["sae.pt"]
    steps = []
    resumed = train_sae(sparse, options, lambda step, *_: steps.append(step), checkpoint)
    assert steps == list(range(stop + 1, options.steps + 1)) and same(resumed, train_sae(sparse, options))
    with pytest.raises(DiffLensError, match="begun with other options"):
        train_sae(sparse, replace(options, lr=1.0), checkpoint=checkpoint)


def test_what_is_cut_off_amid_an_update_goes_on_from_before_it(sparse, tmp_path, monkeypatch):
    """Ctrl+C strikes anywhere: here when the weights are new and all that belongs to them is not."""
    checkpoint = tmp_path / "sae.pt"
    step, done = torch.optim.Adam.step, []

    def step_and_stop(*args, **kwargs):
        step(*args, **kwargs)
        done.append(1)
        if len(done) == 17:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", step_and_stop)
        train_sae(sparse, OPTIONS, checkpoint=checkpoint)
    assert not checkpoint.exists(), "there was no whole state to keep yet"
    assert same(train_sae(sparse, OPTIONS, checkpoint=checkpoint), train_sae(sparse, OPTIONS))


def test_a_training_that_goes_astray_says_so_and_keeps_nothing_of_it(sparse, tmp_path):
    options, checkpoint = replace(OPTIONS, lr=1e30), tmp_path / "sae.pt"
    with pytest.raises(DiffLensError, match=r"at step \d+ the weights are NaN or infinite. Take a smaller"):
        train_sae(sparse, options, checkpoint=checkpoint)
    assert not checkpoint.exists()


@pytest.mark.parametrize("damage", ["cut off", "no training", "a part missing", "pickled objects"])
def test_a_checkpoint_that_cannot_be_read_is_refused_in_a_sentence(sparse, tmp_path, damage):
    checkpoint = tmp_path / "sae.pt"
    with pytest.raises(ZeroDivisionError):
        train_sae(sparse, OPTIONS, lambda *_: 1 / 0, checkpoint)
    if damage == "cut off":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-900])
    elif damage == "no training":
        torch.save(torch.ones(3), checkpoint)
    elif damage == "a part missing":
        saved = torch.load(checkpoint, weights_only=True)
        torch.save({**saved, "weights": {}}, checkpoint)
    else:
        torch.save(OPTIONS, checkpoint)
    with pytest.raises(DiffLensError, match=r"sae\.pt: "):
        train_sae(sparse, OPTIONS, checkpoint=checkpoint)


def test_training_explains_sparse_data_and_keeps_unit_decoder_rows(sparse):
    options = replace(OPTIONS, steps=500, batch=256, lr=1e-2)
    seen, held_out = (
        Activations(sparse.values[:, part], sparse.progress, "middle") for part in (np.s_[:40], np.s_[40:])
    )
    losses = []
    sae = train_sae(seen, options, lambda _, loss, __: losses.append(float(loss)))
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
        saved["weights"]["encoder"][12:] *= 0.02
        torch.save(saved, path)
        return measure_sae(train_sae(sparse, options, checkpoint=path), sparse)

    without, revived = quality(0), quality(8)
    assert without.dead > 0.6 and revived.dead < without.dead - 0.2 and revived.fvu < without.fvu - 0.05


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


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_two_processes_train_the_same_sae_as_one(sparse, tmp_path, activation):
    index = Index(("middle",), (0.0, 0.5), 48, 16, seed=0, model="")
    shards = [
        {"middle": part.movedim(2, -1).half(), SAMPLES: torch.zeros(16, 1)} for part in sparse.values.split(16, 1)
    ]
    record(index, shards, lambda _, shard: shard, tmp_path / "store")
    given = {"latents": 48, "k": 3, "steps": 60, "batch": 128, "dead_after": 10, "aux_k": 8, "activation": activation}
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.safetensors"
        launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        options = [f"--{name}={value}" for name, value in given.items()]
        command = [sys.executable, *launch, str(ROOT / "scripts" / "train_sae.py"), str(tmp_path / "store"), str(out)]
        run = subprocess.run(
            [*command, *options], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert run.returncode == 0, run.stderr
        assert not out.with_suffix(".checkpoint").exists() and "held out" in run.stdout
        found.append(load_sae(out))
    for name in TENSORS:
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), atol=1e-4, rtol=0)
