"""What is large is read piece by piece: a store of 20 GB, ten thousand features, batches of 64."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from difflens_core.activations import Index, open_store
from difflens_core.activations.store import INDEX, SAMPLES, VERSION, plain, shard_path
from difflens_core.steer import Steering

GB = 2**30
STEPS, PER_SHARD, SIDE, WIDTH = 8, 64, 16, 4096  # a shard of them takes 1 GB
SHAPE = (STEPS, PER_SHARD, SIDE, SIDE, WIDTH)


def sparse_shard(path: Path, index: Index, number: int) -> None:
    """A shard of zeros that takes no room on the disk, but for a megabyte of numbers in its beginning."""
    size = torch.Size(SHAPE).numel() * 2
    tensors = {
        "middle": {"dtype": "F16", "shape": SHAPE, "data_offsets": [0, size]},
        SAMPLES: {"dtype": "F32", "shape": [PER_SHARD, 1], "data_offsets": [size, size + 4 * PER_SHARD]},
    }
    told = json.dumps({"index": index.digest, "first": index.pictures_of(number).start})
    header = json.dumps(tensors | {"__metadata__": {"difflens": told, "format": "activations"}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(torch.randn(2**19, generator=torch.Generator().manual_seed(number)).half().numpy().tobytes())
        file.truncate(8 + len(header) + size + 4 * PER_SHARD)


def own_memory() -> int:
    """Bytes that this process takes beside what it has mapped."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and not every system's disks have sparse files")
def test_a_store_of_20_gb_is_drawn_from_without_reading_it(tmp_path):
    index = Index(("middle",), tuple(i / STEPS for i in range(STEPS)), 20 * PER_SHARD, PER_SHARD, 1, "abc")
    for number in range(index.shards):
        sparse_shard(shard_path(tmp_path, number), index, number)
    (tmp_path / INDEX).write_text(json.dumps({"version": VERSION, **plain(index)}))
    before = own_memory()
    seen = open_store(tmp_path).activations()
    assert sum(shard.numel() for shard in seen.shards) * 2 == 20 * GB
    picks = seen.draw(64, seed=0, step=5)
    assert seen.rows(picks).shape == (64, WIDTH)
    firsts = torch.tensor([shard[0, 0, :, 0, 0].float().abs().sum() for shard in seen.shards])
    assert (firsts > 0).all() and len(set(firsts.tolist())) == index.shards
    assert own_memory() - before < 0.2 * GB


@pytest.mark.parametrize("mode", ["move", "ablate"])
def test_ten_thousand_features_edit_a_batch_of_64_as_they_edit_each_picture(toys, mode):
    recipe = toys.recipe(features=10_000, width=32, positions=16, mode=mode)
    h = toys.random(1)(64, 32, 4, 4)
    images = torch.arange(64)
    steering = Steering(recipe, lambda images: images % 3)
    found = steering(h, 0.4, images)
    alone = torch.cat([steering(h[i : i + 1], 0.4, images[i : i + 1]) for i in range(0, 64, 9)])
    assert torch.isfinite(found).all() and (found - h).abs().max() > 0.1 * h.std()
    torch.testing.assert_close(found[::9], alone, atol=1e-3 * float(found.std()), rtol=1e-3)


def test_an_sae_of_ten_thousand_latents_rebuilds_a_batch_of_64_as_each_picture(toys):
    sae, h = toys.sae(latents=10_000, k=64, width=32), toys.random(2)(64, 32, 4, 4)
    together, alone = sae.reconstruct(h, 1), torch.cat([sae.reconstruct(one[None], 1) for one in h])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
