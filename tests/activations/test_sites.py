"""Hooks at a site: what they read, what they change, and that they leave nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from difflens_core.activations import Activations, Kept, Whole, at_step, edit_site, find_site, from_map, to_map
from difflens_core.files import DiffLensError


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).requires_grad_(False)


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_edit_replaces_the_output_only_while_open():
    net, x = model(), torch.ones(4, 3)
    before = net(x)
    with edit_site(net, "1", lambda h: h * 0 + 2):
        torch.testing.assert_close(net(x), net[2](torch.full((4, 3), 2.0)))
    assert torch.equal(net(x), before) and hooks(net) == 0


class Block(nn.Module):
    """Writes into its input, as blocks of some networks do, and hands two streams on."""

    def forward(self, txt: torch.Tensor, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        img += img.square()
        return txt * 2, img


ALL = torch.arange(4)


@contextmanager
def watched(net, site):
    """While open, copies of what is read at `site` are appended to the list yielded."""
    outputs = []
    with edit_site(net, site, lambda h: outputs.append(h.clone()) or h):
        yield outputs


class Image(Whole):
    def given(self, args, kwargs):
        return to_map(kwargs["img"], (2, 3))

    def read(self, output, kwargs):
        return to_map(output[1], (2, 3))

    def write(self, output, kwargs, h):
        return output[0], from_map(h, 3)


def test_an_update_is_output_minus_input_and_its_change_goes_to_the_output():
    net, x = model(), torch.randn(4, 3)
    plain = net[0](x)
    with watched(net, "0 update") as updates, watched(net, "0") as outputs:
        net(x)
    torch.testing.assert_close(updates[0], plain - x)
    assert torch.equal(outputs[0], plain) and hooks(net) == 0
    with edit_site(net, "0 update", lambda h: 3 * h):
        torch.testing.assert_close(net(x), net[2]((plain + 2 * (plain - x)).relu()))
    with edit_site(net, "0 update", lambda h: h):
        assert torch.equal(net(x), net[2](plain.relu()))


def test_an_update_of_a_block_that_writes_into_its_input_and_has_two_streams():
    net, img, txt = nn.ModuleDict({"block": Block()}), torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    expected = img.square()
    seen = []

    def edit(h):
        seen.append(h.clone())
        return h * 0

    with edit_site(net, "block update", edit, Image()):
        found = net["block"](txt, img=img.clone())
    torch.testing.assert_close(seen[0], expected.transpose(1, 2).reshape(2, 5, 2, 3))
    torch.testing.assert_close(found[1], img)
    assert torch.equal(found[0], txt * 2) and hooks(net) == 0 and not net["block"]._forward_pre_hooks


def test_a_module_that_changes_the_shape_has_no_update():
    net = model()
    with pytest.raises(DiffLensError, match="2 update: this module makes 4 x 2 out of 4 x 3, .* Use its output: 2."):  # noqa: SIM117
        with watched(net, "2 update"):
            net(torch.ones(4, 3))
    assert hooks(net) == 0 and not net[2]._forward_pre_hooks


def test_several_streams_need_to_be_told_apart():
    net = nn.ModuleDict({"block": Block()})
    with (
        pytest.raises(DiffLensError, match="block puts out a tuple, .* a module inside it"),
        watched(net, "block"),
    ):
        net["block"](torch.ones(1, 2, 3), img=torch.ones(1, 2, 3))


def test_tokens_are_shown_as_a_map_one_token_wide():
    net, x = model(), torch.randn(4, 7, 3)
    with watched(net, "0") as outputs, edit_site(net, "2", lambda h: h * 2):
        found = net(x)
    torch.testing.assert_close(outputs[0][..., 0].transpose(1, 2), net[0](x))
    assert outputs[0].shape == (4, 3, 7, 1)
    torch.testing.assert_close(found, 2 * net(x))


@pytest.mark.parametrize(
    "opening",
    [lambda net: edit_site(net, "0", lambda h: h), lambda net: at_step(net, 0, 0.0, ALL, [], [Kept("0", [0])])],
)
def test_no_hook_is_left_after_an_exception(opening):
    net = model()
    with pytest.raises(KeyboardInterrupt), opening(net):
        assert hooks(net) == 1
        raise KeyboardInterrupt
    assert hooks(net) == 0


def test_no_hook_is_left_when_the_edit_itself_fails():
    net = model()
    with pytest.raises(ZeroDivisionError), edit_site(net, "0", lambda h: h / (1 // 0)):
        net(torch.ones(1, 3))
    assert hooks(net) == 0


def test_what_is_kept_is_a_copy_in_half_precision_of_what_a_later_layer_overwrites():
    net, x, kept = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)), torch.randn(4, 3, 2, 5), Kept("0", [0, 2])
    for step, factor in enumerate((1, 2, 3)):
        with at_step(net, step, 0.0, ALL, [], [kept]):
            net(factor * x)
    found = kept.taken()
    assert found.shape == (2, 4, 2, 5, 2) and found.dtype == torch.float16 and found.device.type == "cpu"
    for values, factor in zip(found, (1, 3), strict=True):
        expected = nn.functional.conv2d(factor * x, net[0].weight, net[0].bias)
        torch.testing.assert_close(values.movedim(-1, 1).float(), expected, atol=2e-3, rtol=2e-3)
    assert (found < 0).any(), "the in-place ReLU reached the copy"


def test_kept_see_a_site_as_it_is_before_the_edits_and_a_step_that_was_missed_is_said():
    class Double:
        site = "0"

        def __call__(self, h, progress, images):
            assert (progress, images.tolist()) == (0.25, [7, 8])
            return 2 * h

    net, x, kept = nn.Sequential(nn.Conv2d(3, 2, 1)), torch.randn(2, 3, 1, 1), Kept("0", [0, 1], torch.float32)
    plain = net(x)
    with at_step(net, 1, 0.25, torch.tensor([7, 8]), [Double()], [kept]):
        torch.testing.assert_close(net(x), 2 * plain)
    torch.testing.assert_close(kept.values[1].movedim(-1, 1), plain)
    with pytest.raises(DiffLensError, match="0 was read at 1 of 2 steps"):
        kept.taken()


def test_an_unknown_site_is_named_with_what_there_is():
    with pytest.raises(DiffLensError, match="Sequential has no module middle_block. It has: 0, 1, 2"):
        find_site(model(), "middle_block")


@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 4), (2, 3, 4, 4), (0, 1, 3, 4, 4)])
def test_empty_or_misshapen_activations_are_refused(shape):
    with pytest.raises(DiffLensError, match="at least one picture"):
        Activations(torch.zeros(shape), torch.zeros(shape[0]), "middle")


# --- activations as shards ---

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
