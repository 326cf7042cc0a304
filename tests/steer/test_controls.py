"""Random features: others than the recipe's, with an edit as strong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.files import DiffLensError
from difflens_core.steer import random_features, with_latents


def norm(recipe) -> torch.Tensor:
    """Root mean square of the decoded class differences of all steps, in float64."""
    levels = recipe.levels.dense().double()
    edit = torch.einsum("skfp,fc->skpc", levels - levels.mean(dim=1, keepdim=True), recipe.decoder.double())
    return edit.square().mean().sqrt()


def test_random_features_are_others_with_the_same_norm(toys):
    recipe, sae = toys.recipe(), toys.sae()
    found = random_features(recipe, sae, 3)
    assert not set(found.features.tolist()) & set(recipe.features.tolist()) and len(found.features.unique()) == 5
    torch.testing.assert_close(norm(found), norm(recipe), rtol=1e-5, atol=0)
    assert torch.equal(random_features(recipe, sae, 3).features, found.features)
    assert found.info["seed"] == 3 and "random" in found.info["control"]
    few = replace(recipe, features=torch.arange(18))
    with pytest.raises(DiffLensError, match="18 other latents are needed, the SAE has 2"):
        random_features(few, sae, 3)


def test_given_latents_take_the_place_of_the_recipes_row_by_row(toys):
    recipe, sae = toys.recipe(), toys.sae()
    others = torch.tensor([9, 8, 19, 6, 7])
    found = with_latents(recipe, sae, others)
    ratio = found.decoder / sae.decoder[others]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm(found), norm(recipe), rtol=1e-5, atol=0)
    assert torch.equal(found.features, others) and torch.equal(found.levels.maps, recipe.levels.maps)
    for name in ("encoder", "bias", "threshold"):
        assert torch.equal(getattr(found, name), getattr(recipe, name)), name
