"""Hooks at a site: what they read, what they change, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difflens_core.activations import Activations, capture_site, edit_site, find_site
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


@pytest.mark.parametrize("opening", [lambda net: edit_site(net, "0", lambda h: h), lambda net: capture_site(net, "0")])
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


def test_capture_copies_what_a_later_layer_overwrites():
    net, x = model(), -torch.ones(4, 3)
    with capture_site(net, "0", torch.float32) as outputs:
        net(x), net(2 * x)
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[1], torch.nn.functional.linear(2 * x, net[0].weight, net[0].bias))
    assert (outputs[0] < 0).any(), "the in-place ReLU reached the copy"


def test_capture_stores_half_precision_on_the_cpu():
    net = model()
    with capture_site(net, "2") as outputs:
        net(torch.ones(1, 3))
    assert outputs[0].dtype == torch.float16 and outputs[0].device.type == "cpu"


def test_an_unknown_site_is_named_with_what_there_is():
    with pytest.raises(DiffLensError, match="Sequential has no module middle_block. It has: 0, 1, 2"):
        find_site(model(), "middle_block")


@pytest.mark.parametrize("shape", [(2, 0, 3, 4, 4), (2, 3, 4, 4), (0, 1, 3, 4, 4)])
def test_empty_or_misshapen_activations_are_refused(shape):
    with pytest.raises(DiffLensError, match="at least one picture"):
        Activations(torch.zeros(shape), torch.zeros(shape[0]), "middle")
