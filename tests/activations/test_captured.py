"""Activations in shards: their rows, parts and batches, and what training draws of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError


@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 4), (2, 3, 4, 4), (0, 1, 3, 4, 4)])
def test_empty_or_misshapen_activations_are_refused(shape):
    with pytest.raises(DiffLensError, match="at least one picture"):
        Activations(torch.zeros(shape), torch.zeros(shape[0]), "middle")


PROGRESS = torch.tensor([0.0, 0.25, 0.5])


def sharded(*pictures: int, layout: str = "channels last", width: int = 5) -> Activations:
    """3 steps of pictures in shards of the given sizes, 2 x 3 maps; every number tells where it belongs."""
    shape = (3, sum(pictures), width, 2, 3)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    if layout == "channels last":
        values = values.movedim(2, -1).contiguous().movedim(-1, 2)
    return Activations(values.split(list(pictures), dim=1), PROGRESS, "middle")


@pytest.mark.parametrize("layout", ["channels last", "plain"])
@pytest.mark.parametrize("pictures", [(7,), (3, 4), (1, 1, 5)])
def test_rows_are_those_of_step_picture_and_position(pictures, layout):
    found, values = sharded(*pictures, layout=layout), sharded(7).values
    picks = torch.randint(found.rows_in_all, (200,), generator=torch.Generator().manual_seed(0))
    expected = [values[i // 42, i // 6 % 7, :, i % 6 // 3, i % 3] for i in picks.tolist()]
    assert torch.equal(found.rows(picks), torch.stack(expected)) and found.rows_in_all == 3 * 7 * 6
    assert torch.equal(found.values, values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_part_is_a_slice_that_copies_nothing(pictures, data):
    whole = sharded(*pictures)
    start = data.draw(st.integers(0, sum(pictures) - 1))
    stop = data.draw(st.integers(start + 1, sum(pictures)))
    part = whole.part(start, stop)
    assert torch.equal(part.values, whole.values[:, start:stop]) and part.pictures == stop - start
    owners = {shard.untyped_storage().data_ptr() for shard in whole.shards}
    assert {shard.untyped_storage().data_ptr() for shard in part.shards} <= owners
    picks = torch.arange(part.rows_in_all)
    assert torch.equal(part.rows(picks), part.values.movedim(2, -1).reshape(-1, 5))


@pytest.mark.parametrize("rows", [1, 6, 12, 100])
def test_batches_go_through_every_picture_once(rows):
    activations = sharded(3, 4, 1)
    for step in range(3):
        parts = list(activations.batches(step, rows))
        assert [first for first, _ in parts] == [0, *torch.tensor([len(v) for _, v in parts]).cumsum(0)[:-1].tolist()]
        assert torch.equal(torch.cat([values for _, values in parts]), activations.values[step])
        assert max(len(values) for _, values in parts) <= max(1, rows // 6)


def test_a_training_step_draws_the_same_rows_whatever_came_before():
    activations = sharded(4, 4, 4, 2)
    small = 4 * 3 * 6 * 5 * 4 * 2  # bytes of two shards
    for window in (2**30, small):
        steps = [activations.draw(50, 9, step, window) for step in range(20)]
        assert torch.equal(activations.draw(50, 9, 13, window), steps[13])
        assert not torch.equal(activations.draw(50, 8, 13, window), steps[13])


def test_rows_are_drawn_from_everything_alike_when_it_fits():
    activations = sharded(4, 4, 3)
    counts = torch.bincount(activations.draw(200_000, 1, 0), minlength=activations.rows_in_all)
    assert counts.min() > 800 and counts.max() < 1250 and len(counts) == 198


def test_rows_are_drawn_from_few_shards_at_a_time_and_from_all_alike_in_the_end():
    sizes = (4, 4, 4, 4, 4, 2)
    activations = sharded(*sizes)
    shard_of = torch.arange(6).repeat_interleave(torch.tensor(sizes))
    count, window = 18, 4 * 3 * 6 * 5 * 4 * 3  # three shards of six
    drawn, served = [], []
    for step in range(22 * 200):  # 22 steps are a round
        picks = activations.draw(count, 5, step, window)
        drawn.append(picks)
        served.append(frozenset(shard_of[picks // 6 % 22].tolist()))
        assert len(served[-1]) <= 3
    changes = [(a, b) for a, b in zip(served[:22], served[1:23], strict=True) if a | b > a]
    assert all(len(b - a) == 1 for a, b in changes) and 4 <= len(changes) <= 8, "one new shard at a time"
    shares = torch.bincount(torch.cat(drawn), minlength=activations.rows_in_all) / (len(drawn) * count)
    assert (shares > 0).all()
    by_shard = torch.zeros(6).index_add_(0, shard_of.repeat_interleave(6).repeat(3), shares)
    assert (by_shard[:5] - 4 / 22).abs().max() < 0.02


def test_plain_layout_is_copied_and_channels_last_is_not():
    values = torch.randn(3, 2, 5, 2, 3)
    kept = values.movedim(2, -1).contiguous().movedim(-1, 2)
    assert Activations(kept, PROGRESS, "middle").values.data_ptr() == kept.data_ptr()
    copied = Activations(values, PROGRESS, "middle").values
    assert torch.equal(copied, values) and copied.movedim(2, -1).is_contiguous()
    strange = values.transpose(0, 1).expand(2, 3, 5, 2, 3)[:, :, :3]
    found = Activations(strange, PROGRESS[:2], "middle")
    assert torch.equal(found.rows(torch.arange(2 * 3 * 6)), strange.movedim(2, -1).reshape(-1, 3))
