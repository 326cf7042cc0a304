"""Activation stores: written through a kill without losing or doubling a shard, read without loading them, refused."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from difflens_core.activations import SAMPLES, Activations, Index, noise_batches, open_store, record, save_labels
from difflens_core.activations.store import load_labels
from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.locate import METHODS, LabelledPictures, attribute_features, train_probes
from difflens_core.sae import TrainingOptions, hold_out, measure_sae, train_sae
from difflens_core.sae.autoencoder import fit_normalisation
from difflens_core.steer import mean_difference

ROOT = Path(__file__).resolve().parents[2]
INDEX = Index(("middle", "late"), (0.0, 0.25, 0.5), pictures=10, per_shard=4, seed=7, model="abc", info={"steps": 4})


def noises(index: Index = INDEX) -> list[torch.Tensor]:
    return list(noise_batches((3, 4), index.pictures, index.seed, index.per_shard))


def draw(first: int, noise: torch.Tensor, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A stub sampler: activations S x b x H x W x C that depend on the pictures' noise and numbers."""
    numbers = first + torch.arange(len(noise), dtype=torch.float32)
    site = noise.mean(dim=(1, 2))[:, None] + numbers[:, None] + torch.arange(2 * 2 * 6) / 50
    steps = torch.stack([site, site * 2, site - 1]).reshape(3, len(noise), 2, 2, 6).to(dtype)
    return {"middle": steps, "late": -steps[..., :5], SAMPLES: noise * 2}


def stop_at(number: int, error: BaseException):
    """The stub sampler, which fails instead of drawing shard `number`."""

    def draw_or_fail(first: int, noise: torch.Tensor):
        if first == number * INDEX.per_shard:
            raise error
        return draw(first, noise)

    return draw_or_fail


def store_in(folder: Path, index: Index = INDEX) -> Path:
    record(index, noises(index), draw, folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_store_gives_what_was_drawn(tmp_path):
    for store in (record(INDEX, noises(), draw), open_store(store_in(tmp_path / "s"))):
        parts = [draw(first, noise) for first, noise in zip((0, 4, 8), noises(), strict=True)]
        for site in INDEX.sites:
            found = store.activations(site)
            expected = torch.cat([part[site] for part in parts], dim=1).movedim(-1, 2)
            assert torch.equal(found.values, expected) and found.values.dtype == torch.float16
            assert (found.pictures, found.site, found.model) == (10, site, "abc")
            assert found.progress.tolist() == [0.0, 0.25, 0.5]
        assert torch.equal(store.activations().values, store.activations("middle").values)
        assert torch.equal(store.samples(), torch.cat(noises()) * 2)


def test_a_shard_holds_the_channels_of_a_position_side_by_side(tmp_path):
    folder = store_in(tmp_path / "s")
    assert names(folder) == ["index.json", *(f"shard_{i:05}.safetensors" for i in range(3))]
    with safe_open(folder / "shard_00002.safetensors", "pt") as file:
        assert file.get_slice("middle").get_shape() == [3, 2, 2, 2, 6]
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 1 and index["seed"] == 7 and str(tmp_path) not in (folder / "index.json").read_text()


def test_bfloat16_holds_what_float16_cannot(tmp_path):
    def large(first: int, noise: torch.Tensor):
        shard = draw(first, noise, torch.float32)
        return {name: (values * 1e5).to(dtype) if name != SAMPLES else values for name, values in shard.items()}

    dtype = torch.float16
    with pytest.raises(DiffLensError, match="beyond float16.*keep bfloat16"):
        record(INDEX, noises(), large, tmp_path / "s")
    assert names(tmp_path / "s") == ["index.json"]
    dtype = torch.bfloat16
    store = record(replace(INDEX, dtype="bfloat16"), noises(), large, tmp_path / "b")
    assert store.activations().values.dtype == torch.bfloat16 and store.activations().values.abs().max() > 65504
    assert sum(len(values) for _, values in store.activations().batches(0)) == 10


# --- cut off and gone on with ---


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_cancelled_capture_goes_on_without_losing_or_doubling_a_shard(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        record(INDEX, noises(), stop_at(stop, KeyboardInterrupt()), tmp_path / "s")
    assert names(tmp_path / "s")[1:] == [f"shard_{i:05}.safetensors" for i in range(stop)]
    drawn = []
    record(INDEX, noises(), lambda first, noise: drawn.append(first) or draw(first, noise), tmp_path / "s")
    assert drawn == [0, 4, 8][stop:]
    whole = store_in(tmp_path / "whole")
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


def test_a_capture_killed_while_it_writes_a_shard_goes_on(tmp_path):
    """A real kill: the process writes half of its second shard's bytes and ends without any clean-up."""
    script = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "activations")!r}]
from pathlib import Path
import test_store as t
whole = Path.write_bytes
def half(path, data):
    whole(path, data if "00000" in path.name else data[: len(data) // 2])
    "00000" in path.name or os._exit(9)
Path.write_bytes = half
t.store_in(Path({str(tmp_path / "s")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    left = names(tmp_path / "s")
    assert left[-1] == "shard_00000.safetensors" and [name for name in left if name.endswith(".tmp")]
    with pytest.raises(DiffLensError, match="s: 2 of 3 shards are missing .the first is shard_00001.safetensors"):
        open_store(tmp_path / "s")
    store_in(tmp_path / "s")
    assert names(tmp_path / "s") == names(store_in(tmp_path / "whole"))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "def"}, "model abc, now def"),
        ({"seed": 8}, "seed 7, now 8"),
        ({"sites": ("middle",)}, r"sites \['middle', 'late'\], now \['middle'\]"),
        ({"progress": (0.0, 0.5)}, r"progress \[0.0, 0.25, 0.5\], now \[0.0, 0.5\]"),
        ({"pictures": 12}, "pictures 10, now 12"),
        ({"per_shard": 2}, "per_shard 4, now 2"),
        ({"dtype": "bfloat16"}, "dtype float16, now bfloat16"),
        ({"info": {"steps": 5}}, "steps 4, now 5"),
    ],
)
def test_a_store_is_not_gone_on_with_under_other_settings(tmp_path, change, message):
    folder = store_in(tmp_path / "s")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DiffLensError, match=f"s was begun with other settings: {message}. Go on with those"):
        record(replace(INDEX, **change), noises(), draw, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_whole_shards_and_a_clear_error(tmp_path, monkeypatch):
    write, room = Path.write_bytes, [2]

    def write_or_fail(path: Path, data: bytes) -> None:
        room[0] -= 1
        write(path, data if room[0] else data[:100])
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_or_fail)
    with pytest.raises(DiffLensError, match="shard_00001.safetensors could not be written: No space left on device"):
        store_in(tmp_path / "s")
    assert names(tmp_path / "s") == ["index.json", "shard_00000.safetensors"]
    monkeypatch.undo()
    assert open_store(store_in(tmp_path / "s")).activations().pictures == 10


# --- stores that do not fit ---


def damage_index(**changes):
    def damage(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text()) | changes
        (folder / "index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))

    return damage


def exchange(folder: Path) -> None:
    shutil.copy(folder / "shard_00000.safetensors", folder / "shard_00001.safetensors")


def from_another_model(folder: Path) -> None:
    other = store_in(folder.parent / "other", replace(INDEX, model="def"))
    shutil.copy(other / "shard_00001.safetensors", folder / "shard_00001.safetensors")


def without_a_site(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    tensors, info = load_tensors(path, "activations")
    del tensors["late"]
    save_tensors(path, "activations", tensors, info)


def cut(name: str, size: int):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


BAD = {
    "no store": (shutil.rmtree, "not an activation store, index.json cannot be read"),
    "a missing shard": (lambda f: (f / "shard_00001.safetensors").unlink(), "1 of 3 shards are missing.*shard_00001"),
    "a truncated shard": (cut("shard_00001.safetensors", 600), "s/shard_00001.safetensors is damaged or cut off"),
    "an empty shard": (cut("shard_00001.safetensors", 0), "s/shard_00001.safetensors is damaged or cut off"),
    "a cut index": (cut("index.json", 40), "index.json is damaged"),
    "a list as index": (lambda f: (f / "index.json").write_text("[1]"), "index.json is damaged"),
    "an index without seed": (damage_index(seed=None), "index.json is damaged.*seed"),
    "an index of nothing": (damage_index(pictures=0), "index.json is damaged.*0 pictures"),
    "another version": (damage_index(version=2), "store of version 2, this DiffLens reads version 1"),
    "a shard twice": (exchange, "s/shard_00001.safetensors belongs to another capture or another place"),
    "another model's shard": (from_another_model, "s/shard_00001.safetensors belongs to another capture"),
    "a shard without site": (without_a_site, "s/shard_00001.safetensors: lacks late"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_store_that_does_not_fit_is_refused(tmp_path, case):
    damage, message = BAD[case]
    folder = store_in(tmp_path / "s")
    damage(folder)
    with pytest.raises(DiffLensError, match=message):
        open_store(folder)


def test_a_site_that_was_not_captured_is_named_with_those_that_were(tmp_path):
    with pytest.raises(DiffLensError, match="site attic was not captured. There is: middle, late"):
        open_store(store_in(tmp_path / "s")).activations("attic")


def test_nan_is_refused_when_it_is_captured_and_when_it_is_read(tmp_path):
    def broken(first: int, noise: torch.Tensor):
        shard = draw(first, noise)
        shard["late"][2, 1, 0, 0, 3] = torch.nan
        return shard

    with pytest.raises(DiffLensError, match="late puts out numbers that are NaN"):
        record(INDEX, noises(), broken, tmp_path / "s")
    folder = store_in(tmp_path / "t")
    path = folder / "shard_00001.safetensors"
    tensors, info = load_tensors(path, "activations")
    tensors["middle"][1, 2] = torch.inf
    save_tensors(path, "activations", tensors, info)
    activations = open_store(folder).activations()
    with pytest.raises(DiffLensError, match="middle hold NaN or infinite numbers .step 2, pictures 4 to 7"):
        fit_normalisation(activations)


@pytest.mark.parametrize("sites", [(), ("",), ("middle", "middle"), (SAMPLES,)])
def test_sites_must_be_named_once_each(sites):
    with pytest.raises(DiffLensError, match="Name at least one, and each only once"):
        replace(INDEX, sites=sites)


def test_a_sampler_that_gives_another_number_of_steps_is_refused():
    with pytest.raises(DiffLensError, match=r"pictures 0 to 3: middle is \(3, 4, 2, 2, 6\).*expected 2 steps"):
        record(replace(INDEX, progress=(0.0, 0.5)), noises(), draw)


# --- labels ---


def test_labels_lie_beside_the_shards(tmp_path):
    folder, labels = store_in(tmp_path / "s"), {"age": (("young", "old"), torch.arange(10) % 2)}
    save_labels(folder, labels)
    found = load_labels(folder)
    assert found["age"][0] == ("young", "old") and torch.equal(found["age"][1], labels["age"][1])
    assert open_store(folder).activations().pictures == 10
    with pytest.raises(DiffLensError, match="age: got 9 labels, s has 10 pictures"):
        save_labels(folder, {"age": (("young", "old"), torch.zeros(9))})


# --- streaming ---

LABELS = torch.tensor([0, 1, 2] * 10)


@pytest.fixture(scope="module")
def both(toys, tmp_path_factory) -> tuple[Activations, Activations]:
    """The same capture in one piece in memory, and as a store of shards of 7 pictures."""
    whole = toys.activations(pictures=30, size=4)
    whole = replace(whole, shards=(whole.values.half(),))
    index = Index(("middle",), tuple(whole.progress.tolist()), 30, 7, 0, "abc")
    parts = whole.values.movedim(2, -1).split(7, dim=1)
    folder = tmp_path_factory.mktemp("both")
    numbers = [torch.zeros(part.shape[1]) for part in parts]
    record(index, numbers, lambda first, noise: {"middle": parts[first // 7], SAMPLES: noise}, folder)
    stored = open_store(folder).activations()
    assert len(stored.shards) == 5 and torch.equal(stored.values, whole.values)
    return whole, stored


@pytest.fixture(params=[16, 48, 4096])
def small_batches(request, monkeypatch) -> None:
    """Every reader goes through pieces of one, three or all pictures."""
    batches = Activations.batches
    monkeypatch.setattr(Activations, "batches", lambda self, step: batches(self, step, request.param))


@pytest.mark.parametrize("method", METHODS)
def test_attribution_streams_to_the_same_scores(both, toys, small_batches, method):
    whole, stored = both
    sae, probes, weights = toys.sae(), toys.probes(), 1 + toys.random(0)(30).abs()
    found = attribute_features(stored, sae, probes, LABELS, method, weights)
    expected = attribute_features(whole, sae, probes, LABELS, method, weights)
    scale = float(expected.scores.abs().max())  # a score is a difference of levels that are larger than it
    torch.testing.assert_close(found.scores, expected.scores, atol=3e-6 * scale, rtol=1e-6)
    for name in ("difference", "margin"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=1e-6)
    assert found.completeness is None or found.completeness < 1e-6


def test_probes_stream_to_the_same_weights(both, toys, small_batches):
    sae = toys.sae(k=12)
    found, expected = (train_probes(a, sae, LABELS, "age", toys.classes) for a in reversed(both))
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.accuracy, expected.accuracy)


def test_normalisation_quality_and_mean_difference_stream_to_the_same_numbers(both, toys, small_batches):
    whole, stored = both
    sae, recipe = toys.sae(), toys.recipe(positions=16)
    rows = whole.values.double().movedim(2, -1).reshape(3, -1, 6)
    torch.testing.assert_close(fit_normalisation(stored).mean.double(), rows.mean(1), atol=1e-6, rtol=0)
    centred = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(
        fit_normalisation(stored).scale.double(), centred.square().mean((1, 2)).sqrt(), atol=1e-6, rtol=0
    )
    error = variance = 0.0
    for s in range(3):
        x = sae.normalisation.apply(whole.values[s], s)
        error += float((x - sae.decode(sae.encode(whole.values[s], s))).double().square().sum())
        variance += float((x.double() - x.double().mean((0, 1))).square().sum())
    assert measure_sae(sae, stored).fvu == pytest.approx(error / variance, rel=1e-6)
    levels = mean_difference(recipe, [LabelledPictures(stored, LABELS, {})]).levels.dense()
    own = sae.normalisation.apply(whole.values[2], 2)[LABELS == 1].mean(0).T
    torch.testing.assert_close(levels[2, 1].float(), own, atol=2e-3, rtol=1e-3)


def test_training_on_a_store_gives_the_weights_of_training_in_memory(both):
    options = TrainingOptions(latents=16, k=3, steps=12, batch=32)
    found, expected = (train_sae(hold_out(a)[0], options) for a in reversed(both))
    assert torch.equal(found.encoder, expected.encoder) and torch.equal(found.decoder, expected.decoder)


def test_reading_a_store_leaves_it_on_the_disk(tmp_path):
    """Anonymous memory of a fresh process that reads all of a 50 MB store, and draws rows from it."""
    shard = torch.randn(1, 25, 8, 8, 1024).half()
    index = Index(("m",), (0.0,), 400, 25, 0, "abc")
    record(index, [torch.zeros(25)] * 16, lambda first, noise: {"m": shard + first, SAMPLES: noise}, tmp_path / "s")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from difflens_core.activations import open_store
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)
before = anonymous()
a = open_store({str(tmp_path / "s")!r}).activations()
total = sum(float(v[0, :8].float().sum()) for _, v in a.batches(0, 1024))
for step in range(20):
    total += float(a.rows(a.draw(512, 0, step)).float().sum())
print(anonymous() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of memory")
    grown = float(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert grown < 15, f"{grown:.0f} MB of 52 MB were copied into memory"
