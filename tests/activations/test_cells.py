"""Maps divided into cells, and captures that keep one position of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.activations import (
    FINEST,
    Activations,
    FramedActivations,
    capture,
    cells_of,
    coarse,
    one_of_each,
    open_store,
)
from difflens_core.files import DiffLensError
from difflens_core.locate import attribute_features, fit_frames, train_probes
from difflens_core.networks import DenoiserSampler
from difflens_core.steer import Steering, build_recipe

SIZES = [(8, 8), (16, 16), (24, 8), (5, 40), (300, 1), (1, 1), (3, 2), (23, 17)]
SITE = "middle_block"


@pytest.mark.parametrize("most", [4, 64, FINEST])
@pytest.mark.parametrize("size", SIZES)
def test_a_map_is_divided_into_at_most_so_many_rectangles(size, most):
    cells = cells_of(size, most)
    rows, columns = coarse(size, most)
    assert rows * columns <= most and cells.unique().tolist() == list(range(rows * columns))
    if size[0] * size[1] <= most:
        assert cells.tolist() == list(range(size[0] * size[1]))
    where = [(cells.view(size) == cell).nonzero() for cell in range(rows * columns)]
    spans = [of.amax(dim=0) - of.amin(dim=0) + 1 for of in where]
    assert all(len(of) == span.prod() for of, span in zip(where, spans, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_one_position_of_each_cell_is_picked_and_in_the_long_run_every_one(size):
    picks = one_of_each(size, 16, torch.arange(200), 3)
    assert picks.shape == (200, *coarse(size, 16))
    assert (cells_of(size, 16)[picks.flatten(1)] == torch.arange(picks[0].numel())).all()
    assert torch.equal(one_of_each(size, 16, torch.tensor([7, 3]), 3), picks[[7, 3]])
    counts = torch.bincount(picks.flatten(), minlength=size[0] * size[1])
    assert counts.min() > 0
    each = torch.bincount(cells_of(size, 16))[cells_of(size, 16)]
    assert ((counts - 200 / each).abs() < 5 * (200 / each).sqrt()).all(), "uniform in its cell"


@pytest.fixture
def sampler(toys) -> DenoiserSampler:
    return DenoiserSampler(toys.denoiser(any_size=True), 3, size=(32, 48))  # a map of 4 x 6


def test_a_capture_keeps_positions_of_large_maps_whatever_the_batch(sampler, tmp_path):
    whole, kept = (capture(sampler, 6, 5, 6, cells=cells) for cells in (0, 4))
    values, (found,) = whole.activations().values, kept.activations().shards
    assert whole.activations().size is None and kept.activations().size == (4, 6) == kept.activations().full_map
    assert found.shape == (3, 6, values.shape[2], 2, 2) and kept.activations().map == (2, 2)
    for step in range(3):
        picks = one_of_each((4, 6), 4, torch.arange(6), 5 + step)
        expected = values[step].flatten(2).gather(2, picks.flatten(1)[:, None].expand(-1, values.shape[2], -1))
        assert torch.equal(found[step].flatten(2), expected)
    cut = capture(sampler, 6, 5, 4, folder=tmp_path / "s", cells=4)
    torch.testing.assert_close(cut.activations().values, found, atol=2e-3, rtol=2e-3)
    assert open_store(tmp_path / "s").activations().size == (4, 6)
    with pytest.raises(DiffLensError, match="cells 4, now 0"):
        capture(sampler, 6, 5, 4, folder=tmp_path / "s", cells=0)
    small = capture(sampler, 2, 5, 2)
    assert small.activations().size is None and small.activations().positions == 24, "it is no large map"


def test_a_recipe_of_some_positions_serves_the_whole_map(toys):
    """The classes differ by a plane over the map: as much is found from a quarter of it."""
    size, pictures = (16, 16), 60
    labels = torch.arange(pictures) % 2
    y, x = torch.meshgrid(torch.arange(16) / 16, torch.arange(16) / 16, indexing="ij")
    plane = (labels * 2 - 1)[:, None, None] * (0.5 + y + 0.5 * x)
    values = 0.1 * toys.random(2)(3, pictures, 6, *size)
    values[:, :, 0] += plane
    picks = torch.stack([one_of_each(size, 64, torch.arange(pictures), step) for step in range(3)])
    some = values.flatten(3).gather(3, picks.flatten(2)[:, :, None].expand(-1, -1, 6, -1)).unflatten(3, (8, 8))
    sae, levels = toys.sae(k=20), []
    for of, full in ((values, None), (some, size)):
        activations = Activations(of, torch.arange(3) / 3, "middle", size=full)
        probes = train_probes(activations, sae, labels, "look", ("a", "b"))
        found = attribute_features(activations, sae, probes, labels)
        recipe = build_recipe(found, sae, probes, activations, labels, count=20)
        assert recipe.map == size and recipe.levels.positions == 256
        edited = Steering(recipe, torch.Tensor.long)(of[1, :2].new_zeros(1, 6, *size), 0.4, torch.ones(1))
        assert not Steering(recipe, torch.Tensor.long).stretch(edited)
        levels.append((recipe.levels.dense()[:, 1] - recipe.levels.dense()[:, 0]).mean(dim=0).T @ recipe.decoder)
    whole, part = (level.view(*size, 6)[2:-2, 2:-2, 0] for level in levels)
    torch.testing.assert_close(part, whole, atol=0.15, rtol=0.1)


def test_frames_are_read_in_positions_of_the_whole_map(toys):
    """Rows tell where the frame's centre and side are, at every position: also where every second is captured."""
    size, pictures = (16, 16), 40
    draw = torch.Generator().manual_seed(1)
    centre, side = 4 + 8 * torch.rand(pictures, 2, generator=draw), 4 + 6 * torch.rand(pictures, generator=draw)
    frames = torch.cat([centre - side[:, None] / 2, centre + side[:, None] / 2], dim=1) / 16
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    rows = torch.stack([
        (centre[:, 0, None, None] - x), (centre[:, 1, None, None] - y), side.log()[:, None, None].expand(-1, 16, 16),
        *torch.zeros(3, pictures, 16, 16),
    ], dim=1)  # fmt: skip
    inside = (rows[:, 0].abs() < 0.35 * side[:, None, None]) & (rows[:, 1].abs() < 0.45 * side[:, None, None])
    rows[:, 3] = inside.float()
    whole = Activations(rows[None], torch.zeros(1), "middle")
    some = Activations(rows[None, :, :, ::2, ::2].contiguous(), torch.zeros(1), "middle", size=size)
    norm = replace(toys.normalisation(), progress=torch.zeros(1), mean=torch.zeros(1, 6), scale=torch.ones(1))
    for activations in (whole, some):
        probes = fit_frames(FramedActivations.of(activations, frames), norm)
        found = probes.find(rows.flatten(2), size, 0)
        torch.testing.assert_close(found, frames, atol=0.06, rtol=0)
