"""The true architectures, with random weights: they fit the names and sizes that the small ones only imitate.

python scripts/test.py --slow
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.steer import Steering


@pytest.mark.slow
@pytest.mark.parametrize(("family", "parameters", "side"), [("SD1.5", 859_520_964, 4), ("SDXL", 2_567_463_684, 8)])
def test_capture_and_steer_at_the_mid_block(inside, toys, family, parameters, side):
    """On latents of 32 x 32, a picture of 256 px."""
    sizes, dtype = inside.FULL[family], {"SD1.5": torch.float32, "SDXL": torch.bfloat16}[family]
    model = inside.random_model(inside.SMALL[family][0], sizes, dtype)
    assert sum(weight.numel() for weight in model.model.diffusion_model.parameters()) == parameters
    positive = inside.prompt(family, 1, tokens=77, width=sizes["context_dim"])
    latent = inside.latent(family, 1, 32, 32)
    sites = ("mid_block", "down_blocks.2.attentions.1 update")
    store = inside.host.capture(model, positive, latent, 1, 1, "euler", "normal", 0, sites, dtype="bfloat16")
    middle, update = (store.activations(site).values for site in sites)
    assert middle.shape == (1, 1, 1280, side, side) and update.shape == (1, 1, 1280, 8, 8)
    assert torch.equal(store.samples(), inside.sample(model, positive, latent=latent))
    recipe = replace(toys.recipe(width=1280, positions=side**2, mode="move"), site="mid_block")
    for strength in (0.0, 1.0):
        settings = replace(recipe, strength=(strength,) * 3)
        steered = inside.host.apply_site(model, "mid_block", Steering(settings, lambda images: images), "Steer")
        drawn = inside.sample(steered, positive, latent=latent)
        assert torch.equal(drawn, store.samples()) == (strength == 0) and torch.isfinite(drawn).all()
