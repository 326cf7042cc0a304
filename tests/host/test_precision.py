"""Models in other precisions are read and steered as the model of the same weights in full precision."""

from __future__ import annotations

import pytest
import torch
from test_survives import SITES, STEPS, check, draw, steered

# How the weights are stored, what is computed in, and how many spreads a record may be from full precision's.
PRECISIONS = {
    "fp16": (torch.float16, None, 0.005), "bf16": (torch.bfloat16, None, 0.2),
    "fp16, cast to bf16": (torch.float16, torch.bfloat16, 0.2), "fp16, cast": (torch.float16, torch.float32, 0.005),
    "fp8 e4m3, cast": (torch.float8_e4m3fn, torch.float32, 0.005),
    "fp8 e5m2, cast to fp16": (torch.float8_e5m2, torch.float16, 0.005),
}  # fmt: skip
EVERY = [
    pytest.param(*site, name, marks=[pytest.mark.slow] if site[0] == "U-Net" and "bf16" in name else [])
    for site in SITES
    for name in PRECISIONS
]
# The same for weights that are quantised; int8 is multiplied as it is.
QUANTISED = {"float8_e4m3fn": 0.005, "float8_e5m2": 0.005, "int8_tensorwise": 0.03, "nvfp4": 0.005, "mxfp8": 0.005}


def full_precision(inside, family, model):
    """A MODEL in fp32 with the weights that another one has in its own precision."""
    own, known = inside.random_model(*inside.SMALL[family][:2]), weights_of(model)
    for name, weight in weights_of(own).items():
        value = known[name]
        weight.copy_(value.dequantize() if isinstance(value, inside.QuantizedTensor) else value.float())
    return own


def weights_of(model):
    network = model.model.diffusion_model
    return dict(network.named_parameters()) | dict(network.named_buffers())


def recorded(inside, model, family, site):
    store = inside.host.capture(
        model, inside.prompt(family, 1), inside.latent(family), 2, STEPS, "euler", "normal", 0, (site,)
    )
    inside.forget()
    return store.activations().values.float()


@torch.inference_mode()  # as ComfyUI runs nodes
def compared(inside, toys, make, family, site, within):
    """Steered pictures are as near to those of full precision as unsteered ones are, and records are near."""
    model = make()
    full = full_precision(inside, family, model)
    plain, found = draw(inside, full, family), check(inside, toys, model, family, site)
    expected = draw(inside, steered(inside, toys, full, family, site, 1.0), family)
    rounding = (draw(inside, model, family) - plain).abs().max()
    off, effect = (found - expected).abs().max(), (expected - plain).abs().max()
    assert off < 3 * rounding + 1e-3 * plain.std() and off < effect
    records, read = (recorded(inside, by, family, site) for by in (full, model))
    assert (read - records).std() < within * records.std()


@pytest.mark.parametrize(("family", "site", "precision"), EVERY)
def test_weights_in_other_precisions_are_steered_and_read(inside, toys, family, site, precision):
    dtype, cast, within = PRECISIONS[precision]
    compared(inside, toys, lambda: inside.random_model(*inside.SMALL[family][:2], dtype, cast), family, site, within)


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_weights_are_steered_and_read(inside, toys, form):
    compared(inside, toys, lambda: inside.quantised_model("Flux", form), "Flux", "double_blocks.1", QUANTISED[form])
