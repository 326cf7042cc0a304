"""Capture: the noise and the pictures of one sampling, however it is cut."""

from __future__ import annotations

import pytest
import torch

from difflens_core.activations import Kept, capture, noise_batches, open_store
from difflens_core.files import DiffLensError
from difflens_core.networks import DenoiserSampler, sample, start_noise


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 5)])
@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_noise_in_batches_is_the_noise_drawn_at_once(shape, batch):
    whole = torch.randn(21, *shape, generator=torch.Generator().manual_seed(3))
    parts = list(noise_batches(shape, 21, 3, batch))
    assert {len(part) for part in parts[:-1]} <= {batch} and torch.equal(torch.cat(parts), whole)


def test_capture_in_pieces_equals_one_sampling(toys, tmp_path):
    model, sites = toys.denoiser(), ("middle_block", "after_middle")
    done = []
    store = capture(DenoiserSampler(model, 4), 5, 0, 2, sites, folder=tmp_path / "s", on_batch=done.append)
    assert done == [2, 4, 5]
    noise = start_noise(5, 0, 16)
    for site in sites:
        kept = [Kept(site, range(4)) for _ in range(3)]
        parts = [sample(model, part, 4, kept=[one]) for part, one in zip(noise.split(2), kept, strict=True)]
        expected = torch.cat([one.taken().movedim(-1, 2) for one in kept], dim=1)
        assert torch.equal(store.activations(site).values, expected)
    assert torch.equal(store.samples(), torch.cat(parts))
    again = capture(DenoiserSampler(model, 4), 5, 0, 2, sites, folder=tmp_path / "s", on_batch=done.append)
    assert done == [2, 4, 5], "a finished store is not drawn again"
    assert torch.equal(again.samples(), store.samples())
    with pytest.raises(DiffLensError, match="other settings: model"):
        capture(DenoiserSampler(toys.denoiser(8), 4), 5, 0, 2, sites, folder=tmp_path / "s")


def test_a_cancelled_capture_gives_the_pictures_of_an_uninterrupted_one(toys, tmp_path):
    def cancel(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    model = toys.denoiser()
    with pytest.raises(KeyboardInterrupt):
        capture(DenoiserSampler(model, 3), 6, 1, 2, folder=tmp_path / "s", on_batch=cancel)
    resumed = capture(DenoiserSampler(model, 3), 6, 1, 2, folder=tmp_path / "s")
    whole = capture(DenoiserSampler(model, 3), 6, 1, 2)
    assert torch.equal(resumed.samples(), whole.samples())
    assert torch.equal(resumed.activations().values, whole.activations().values)


@pytest.mark.parametrize("folder", [None, "s"])
def test_a_capture_goes_on_until_it_has_enough_and_no_further_than_it_may(toys, tmp_path, folder):
    sampler, path = DenoiserSampler(toys.denoiser(), 3), folder and tmp_path / folder

    def until(count: int, stop: int, most: int = 12):
        told = []

        def enough(latents: torch.Tensor) -> bool:
            told.append(len(latents))
            return sum(told) >= stop

        return capture(sampler, count, 1, 2, folder=path, most=most, enough=enough), told

    whole = capture(sampler, 12, 1, 2)
    store, told = until(4, stop=7)
    assert store.index.pictures == 8 and told == [2] * 4
    assert torch.equal(store.samples(), whole.samples()[:8])
    assert torch.equal(store.activations().values, whole.activations().values[:, :8])
    store, told = until(4, stop=3)
    assert store.index.pictures == (8 if folder else 4), "what is there is kept"
    store, told = until(4, stop=100)
    assert store.index.pictures == 12 and told == [2] * 6 and torch.equal(store.samples(), whole.samples())
    if folder:
        assert open_store(path).index == store.index
        with pytest.raises(DiffLensError, match="other settings: most 12, now 14"):
            until(4, stop=100, most=14)


def test_a_capture_that_goes_on_until_it_has_enough_can_be_cut_off(toys, tmp_path):
    def cancel(done: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    def enough():
        told = []
        return lambda latents: told.append(latents) or len(told) == 5

    sampler = DenoiserSampler(toys.denoiser(), 3)
    with pytest.raises(KeyboardInterrupt):
        capture(sampler, 4, 1, 2, folder=tmp_path / "s", on_batch=cancel, most=16, enough=enough())
    with pytest.raises(DiffLensError, match="shards are missing"):
        open_store(tmp_path / "s")
    resumed = capture(sampler, 4, 1, 2, folder=tmp_path / "s", most=16, enough=enough())
    whole = capture(sampler, 4, 1, 2, most=16, enough=enough())
    assert resumed.index.pictures == whole.index.pictures == 10
    assert torch.equal(resumed.samples(), whole.samples())
    assert torch.equal(resumed.activations().values, whole.activations().values)


def test_twins_start_from_one_noise_however_they_are_cut(toys, tmp_path):
    sampler = DenoiserSampler(toys.denoiser(), 3)
    store = capture(sampler, 10, 1, 4, folder=tmp_path / "s", twins=3)  # rounded up to 12, 6 at once
    noise = start_noise(4, 1, 16)
    assert torch.equal(store.samples(), sample(toys.denoiser(), noise.repeat_interleave(3, dim=0), 3))
    assert store.activations().twins == open_store(tmp_path / "s").activations().part(0, 6).twins == 3
    whole = capture(sampler, 12, 1, 12, twins=3)
    assert torch.equal(whole.activations().values, store.activations().values)
    assert capture(sampler, 12, 1, 12).activations().twins == 1


def test_of_large_maps_twins_keep_the_same_positions_at_every_step(toys):
    x, y = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    h = torch.stack([x, y])[None].expand(6, -1, -1, -1)
    one = Kept("middle_block", range(3), torch.float32, 4, torch.arange(6), 5, 3)
    for step in range(3):
        one.keep(step, h)
    kept = one.taken()
    assert torch.equal(kept, kept[:1].expand_as(kept)), "at every step"
    assert torch.equal(kept[0, :3], kept[0, :1].expand(3, -1, -1, -1)), "in all twins"
    assert not torch.equal(kept[0, 0], kept[0, 3]), "of another noise others"


def test_a_store_whose_twins_do_not_fit_is_refused(toys, tmp_path):
    capture(DenoiserSampler(toys.denoiser(), 3), 4, 1, 2, folder=tmp_path / "s", twins=2)
    index = tmp_path / "s" / "index.json"
    for wrong in ('"twins": 3', '"twins": 0', '"twins": "2"'):
        index.write_text(index.read_text().replace('"twins": 2', wrong))
        with pytest.raises(DiffLensError, match="expected a number that divides the pictures"):
            open_store(tmp_path / "s")
        index.write_text(index.read_text().replace(wrong, '"twins": 2'))
