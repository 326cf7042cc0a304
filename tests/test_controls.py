"""Random features: others than the recipe's, with an edit as strong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.controls import random_features, with_latents
from difflens_core.files import DiffLensError


def norms(recipe) -> torch.Tensor:
    """Root mean square of the decoded class differences of every step, in float64."""
    levels = recipe.levels.double()
    edit = torch.einsum("skfp,fc->skpc", levels - levels.mean(dim=1, keepdim=True), recipe.decoder.double())
    return edit.square().mean(dim=(1, 2, 3)).sqrt()


def test_random_features_are_others_with_the_same_norm(toys):
    recipe, sae = toys.recipe(), toys.sae()
    found = random_features(recipe, sae, 3)
    assert not set(found.features.tolist()) & set(recipe.features.tolist()) and len(found.features.unique()) == 5
    assert torch.equal(found.decoder, sae.decoder[found.features])
    torch.testing.assert_close(norms(found), norms(recipe), rtol=2e-3, atol=0)
    assert torch.equal(random_features(recipe, sae, 3).features, found.features)
    assert found.info["seed"] == 3 and "random" in found.info["control"]
    few = replace(recipe, features=torch.arange(18))
    with pytest.raises(DiffLensError, match="18 other latents are needed, the SAE has 2"):
        random_features(few, sae, 3)


def test_given_latents_take_the_place_of_the_recipes_row_by_row(toys):
    recipe, sae = toys.recipe(), toys.sae()
    others = torch.tensor([9, 8, 19, 6, 7])
    found = with_latents(recipe, sae, others)
    for row, latent in enumerate(others.tolist()):
        assert torch.equal(found.encoder[row], sae.encoder[latent]) and found.bias[row] == sae.encoder_bias[latent]
        assert torch.equal(found.decoder[row], sae.decoder[latent])
    torch.testing.assert_close(norms(found), norms(recipe), rtol=2e-3, atol=0)
    ratio = found.levels.double() / recipe.levels.double()
    for step in ratio:
        torch.testing.assert_close(step, step[0, 0, 0].expand_as(step), rtol=5e-3, atol=0)
