"""Recipes made from what attribution found: whose the latents are, their thresholds and their levels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError
from difflens_core.locate import attribute_features
from difflens_core.steer import Steering, build_recipe, building
from difflens_core.steer.building import SOFTENING, captured_part, fit_thresholds

LABELS = torch.arange(12) % 3


def build(toys, **options):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    attribution = attribute_features(activations, sae, probes, LABELS)
    return attribution, sae, build_recipe(attribution, sae, probes, activations, LABELS, **{"count": 4, **options})


def class_means(values: torch.Tensor, sae, recipe) -> torch.Tensor:
    """Mean activity of the recipe's latents in each class's pictures, at every step and position: S x K x F x P."""
    found = []
    for s, h in enumerate(values):
        latents = sae.encode(h, sae.normalisation.step_at(s / len(values)))
        dense = torch.zeros(12, 4, 20).scatter_(2, latents.indices, latents.values)[:, :, recipe.features]
        found.append(torch.stack([dense[c == LABELS].mean(dim=0).T for c in range(3)]))
    return torch.stack(found)


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


def test_of_an_encoder_that_is_told_the_time_the_recipe_keeps_what_it_is_told(toys):
    sae, modulation = toys.sae(), toys.random(21)(3, 2, 6)
    told = replace(sae, normalisation=replace(sae.normalisation, modulation=modulation))
    activations, probes = toys.activations(), toys.probes()
    attribution = attribute_features(activations, told, probes, LABELS)
    recipe = build_recipe(attribution, told, probes, activations, LABELS, count=4)
    assert torch.equal(recipe.normalisation.modulation, modulation)
    for step, (gain, offset) in enumerate(modulation):
        own = replace(sae, encoder=sae.encoder * (1 + gain), encoder_bias=sae.encoder_bias + sae.encoder @ offset)
        found, expected = (one.encode(activations.values[step], step) for one in (told, own))
        torch.testing.assert_close(found.values, expected.values)
        assert torch.equal(found.indices, expected.indices)


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


def test_of_many_rows_some_tell_the_thresholds(toys, monkeypatch):
    """Here every picture thrice, so that a third of the rows are all that there are."""
    sae, features, activations = toys.sae(), torch.tensor([0, 3, 7]), toys.activations()
    thrice = activations.values.repeat_interleave(3, dim=4)
    expected = fit_thresholds(activations, sae, features)
    monkeypatch.setattr(building, "GATED", activations.rows_in_all)
    found = fit_thresholds(Activations(thrice, activations.progress, "middle"), sae, features)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1])


def test_a_recipe_holds_the_best_latents_of_every_class_and_knows_whose_they_are(toys):
    attribution, sae, recipe = build(toys)
    speaks = (attribution.scores > 0) & (attribution.difference > 0)
    order = attribution.scores.argsort(dim=1, descending=True)
    own = [{*[n for n in order[c].tolist() if speaks[c, n]][:4]} for c in range(3)]
    assert recipe.features.tolist() == sorted(set.union(*own)) and min(map(len, own)) > 0
    for c in range(3):
        assert set(recipe.features[recipe.member[c]].tolist()) == own[c]
    assert torch.equal(recipe.decoder, sae.decoder[recipe.features])
    assert torch.equal(recipe.encoder, sae.encoder[recipe.features])
    assert torch.equal(recipe.bias, sae.encoder_bias[recipe.features])
    torch.testing.assert_close(
        recipe.levels.dense(), class_means(toys.activations().values, sae, recipe), rtol=1e-4, atol=1e-4
    )
    assert recipe.strength == (1.0, 1.0, 1.0) and recipe.site == "middle" and recipe.width == 6


@pytest.mark.parametrize("steps", [2, 4])
def test_levels_probes_and_normalisation_share_one_grid_of_steps(toys, steps):
    """A capture may have another number of steps than the SAE and the probes were trained on (3)."""
    sae, probes = toys.sae(), toys.probes()
    values = toys.activations(steps=steps).values
    activations = Activations(values, torch.arange(steps) / steps, "middle")
    attribution = attribute_features(activations, sae, probes, LABELS)
    recipe = build_recipe(attribution, sae, probes, activations, LABELS, count=4)
    means = class_means(values, sae, recipe)
    for s in range(steps):
        at, near = recipe.normalisation.step_at(s / steps), sae.normalisation.step_at(s / steps)
        torch.testing.assert_close(recipe.levels.dense()[at], means[s], rtol=1e-4, atol=1e-4)
        assert torch.equal(recipe.normalisation.mean[at], sae.normalisation.mean[near])
        assert torch.equal(recipe.normalisation.scale[at], sae.normalisation.scale[near])
        softened = (
            probes.weight[probes.step_at(s / steps)] / SOFTENING,
            probes.bias[probes.step_at(s / steps)] / SOFTENING,
        )
        assert torch.equal(recipe.probe_weight[at], softened[0]) and torch.equal(recipe.probe_bias[at], softened[1])


def test_a_recipe_edits_where_it_was_captured_and_nowhere_else():
    assert captured_part(torch.arange(20) / 20) == (0.0, 1.0)
    assert captured_part(torch.tensor([0.67, 0.77, 0.87])) == (0.67, pytest.approx(0.97))
    assert captured_part(torch.tensor([0.5])) == (0.5, 1.0)


def test_a_map_of_unknown_layout_is_refused_at_the_first_step(toys):
    recipe = replace(toys.recipe(positions=6), map=(2, 3), start=0.5)
    steering = Steering(recipe, lambda images: images % 3)
    assert torch.equal(steering(torch.zeros(1, 6, 2, 3), 0.0, torch.tensor([0])), torch.zeros(1, 6, 2, 3))
    with pytest.raises(DiffLensError, match="is 6 x 1, the recipe was made on 2 x 3, and how the one lies"):
        steering(torch.zeros(1, 6, 6, 1), 0.0, torch.tensor([0]))
    old = replace(toys.recipe(positions=16), map=None)
    assert old.fits(4, 4) and old.fits(16, 1) and not old.fits(2, 8)
