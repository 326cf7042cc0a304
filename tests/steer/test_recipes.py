"""Building a recipe: gates that imitate TopK, membership, and captures with another number of steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError
from difflens_core.locate import attribute_features
from difflens_core.sae import NORMALISATION
from difflens_core.steer import build_recipe, load_recipe, save_recipe, with_settings
from difflens_core.steer.building import SOFTENING, fit_thresholds
from difflens_core.steer.recipes import PLAIN, TENSORS

LABELS = torch.arange(12) % 3


def build(toys, **options):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    attribution = attribute_features(activations, sae, probes, LABELS)
    return attribution, sae, build_recipe(attribution, sae, probes, activations, **{"count": 4, **options})


def gates(toys, sae, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations (rows x N) and whether TopK keeps them, of every step, picture and position."""
    pre, on = [], []
    for s, h in enumerate(toys.activations().values[:, :pictures]):
        rows = sae.normalisation.apply(h, s).flatten(0, 1) @ sae.encoder.T + sae.encoder_bias
        kept = torch.zeros_like(rows, dtype=torch.bool).scatter(
            1, rows.argsort(dim=1, descending=True)[:, : sae.k], True
        )
        pre.append(rows)
        on.append(kept & (rows > 0))
    return torch.cat(pre), torch.cat(on)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_no_threshold_agrees_better_with_top_k(toys, k):
    sae, features = toys.sae(k=k), torch.tensor([0, 3, 7, 19])
    threshold, agreement = fit_thresholds(toys.activations(), sae, features, pictures=5)
    pre, on = gates(toys, sae, 5)
    best = []
    for f, found in zip(features.tolist(), threshold, strict=True):
        tried = [0.0, *pre[:, f].clamp(min=0).tolist()]
        best.append(max(float(((pre[:, f] > t) == on[:, f]).float().mean()) for t in tried))
        assert float(((pre[:, f] > found) == on[:, f]).float().mean()) == pytest.approx(best[-1])
    assert agreement == pytest.approx(np.mean(best)) and (threshold >= 0).all()


def test_a_recipe_holds_the_best_latents_of_every_class_and_knows_whose_they_are(toys):
    attribution, sae, recipe = build(toys)
    top = attribution.scores.argsort(dim=1, descending=True)[:, :4]
    assert recipe.features.tolist() == sorted(set(top.flatten().tolist()))
    for c in range(3):
        assert set(recipe.features[recipe.member[c]].tolist()) == set(top[c].tolist())
    assert torch.equal(recipe.decoder, sae.decoder[recipe.features])
    assert torch.equal(recipe.encoder, sae.encoder[recipe.features])
    assert torch.equal(recipe.bias, sae.encoder_bias[recipe.features])
    assert torch.equal(recipe.levels, attribution.levels[:, :, recipe.features])
    assert recipe.strength == (1.0, 1.0, 1.0) and recipe.site == "middle" and recipe.width == 6


@pytest.mark.parametrize("steps", [2, 5])
def test_levels_probes_and_normalisation_share_one_grid_of_steps(toys, steps):
    """A capture may have another number of steps than the SAE and the probes were trained on (3)."""
    sae, probes = toys.sae(), toys.probes()
    values = toys.activations(steps=steps).values
    activations = Activations(values, torch.arange(steps) / steps, "middle")
    attribution = attribute_features(activations, sae, probes, LABELS)
    recipe = build_recipe(attribution, sae, probes, activations, count=4)
    for s in range(steps):
        at, near = recipe.normalisation.step_at(s / steps), sae.normalisation.step_at(s / steps)
        assert torch.equal(recipe.levels[at], attribution.levels[s][:, recipe.features])
        assert torch.equal(recipe.normalisation.mean[at], sae.normalisation.mean[near])
        assert torch.equal(recipe.normalisation.scale[at], sae.normalisation.scale[near])
        softened = (
            probes.weight[probes.step_at(s / steps)] / SOFTENING,
            probes.bias[probes.step_at(s / steps)] / SOFTENING,
        )
        assert torch.equal(recipe.probe_weight[at], softened[0]) and torch.equal(recipe.probe_bias[at], softened[1])


def test_settings_change_a_copy(toys):
    recipe = toys.recipe()
    changed = with_settings(recipe, strength=2, mode="move", start=0.1, end=0.9)
    assert (changed.strength, changed.mode, changed.start, changed.end) == ((2.0,) * 3, "move", 0.1, 0.9)
    assert with_settings(recipe, strength=(3.0, 0.0, 1.0)).strength == (3.0, 0.0, 1.0)
    assert recipe.mode == "shift" and recipe.strength == (1.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mode": "push"}, "'push' is unknown"), ({"strength": (1.0,)}, "1 strengths for 3 classes")],
)
def test_a_recipe_that_cannot_steer_is_refused(toys, change, message):
    with pytest.raises(DiffLensError, match=message):
        replace(toys.recipe(), **change)


def test_round_trip(toys, tmp_path):
    recipe = toys.recipe(mode="move", start=0.1, end=0.8, strength=(2.0, 0.0, 1.5), info={"pictures": 12})
    path = tmp_path / "r.safetensors"
    save_recipe(path, recipe)
    found = load_recipe(path)
    for name in TENSORS:
        expected = getattr(recipe, name)
        torch.testing.assert_close(getattr(found, name), expected, atol=1e-3, rtol=1e-3)
    for name in PLAIN:
        assert getattr(found, name) == getattr(recipe, name)
    assert all(torch.equal(getattr(found.normalisation, n), getattr(recipe.normalisation, n)) for n in NORMALISATION)
