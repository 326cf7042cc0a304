"""Hooks at a site: what they read, what they change, and that they leave nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from difflens_core.activations import Kept, Whole, at_step, edit_site, find_site, from_map, to_map
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


def test_what_comes_in_a_tuple_of_one_is_read_and_written_there():
    """As from the attentions of a U-Net of diffusers."""

    class Alone(nn.Module):
        def forward(self, x):
            return (2 * x,)

    net, x = nn.ModuleDict({"alone": Alone()}), torch.randn(2, 3, 4, 5)
    for site, expected in (("alone", 2 * x + 1), ("alone update", 2 * x + 1)):
        with watched(net, site) as outputs, edit_site(net, site, lambda h: h + 1):
            (found,) = net["alone"](x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(outputs[0], x if site.endswith("update") else 2 * x)


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
