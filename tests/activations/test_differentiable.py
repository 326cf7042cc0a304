"""Networks that were loaded in inference mode can be differentiated, and stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difflens_core.activations import Leaf, differentiable, edit_site


def loaded_by_a_host() -> nn.Module:
    torch.manual_seed(0)
    with torch.inference_mode():
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 3)
        return nn.Sequential(*layers).eval().requires_grad_(False)


def state(model: nn.Module) -> list:
    return [*model.parameters(), *model.buffers()]


def test_a_network_loaded_in_inference_mode_is_differentiated_by_what_a_site_puts_out():
    model, leaf, x = loaded_by_a_host(), Leaf("2"), torch.randn(2, 3, 9, 9)
    before = state(model)

    def run() -> torch.Tensor:
        with edit_site(model, "2", lambda h: leaf(h, 0.0, torch.arange(2))):
            return model(x).square().sum(dim=(1, 2, 3))

    with pytest.raises(RuntimeError, match="[Ii]nference"), torch.enable_grad():
        run()
    with torch.inference_mode(), differentiable(model):  # as a node that is executed in inference mode
        assert all(shared.data_ptr() == old.data_ptr() for shared, old in zip(state(model), before, strict=True))
        (slope,) = torch.autograd.grad(run().sum(), leaf.h)
    assert all(now is old for now, old in zip(state(model), before, strict=True))
    h, step = leaf.h.detach().double(), torch.zeros_like(leaf.h, dtype=torch.float64)
    rest = nn.Sequential(model[3], model[4])
    with torch.inference_mode():
        rest = rest.double()
        step[1, 4, 3, 2] = 1e-6
        found = (rest(h + step).square().sum() - rest(h - step).square().sum()) / 2e-6
    assert float(slope[1, 4, 3, 2]) == pytest.approx(float(found), rel=1e-4)


def test_what_a_host_replaces_meanwhile_is_left_to_it_and_an_error_puts_all_back():
    model = loaded_by_a_host()
    before, patched = dict(model.named_parameters()), nn.Parameter(torch.ones(2), False)
    with pytest.raises(ZeroDivisionError), differentiable(model):
        model[4].bias = patched
        raise ZeroDivisionError
    assert model[4].bias is patched and model[0].weight is before["0.weight"]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
