"""What features do in captured pictures, against loops over single numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from difflens_core.classifiers import NO_CLASS
from difflens_core.explore import activity, fire_together, observe, probe_classes
from difflens_core.files import DiffLensError

LABELS = torch.tensor([0, 1, 2, 0, 1, NO_CLASS, 0, 1, 2, 0, 1, NO_CLASS])


def dense(recipe, activations) -> torch.Tensor:
    """Activity of every latent, one picture, step and position at a time: S x B x F x H x W."""
    steps, pictures, _, height, width = activations.values.shape
    found = torch.zeros(steps, pictures, len(recipe.features), height, width)
    for s in range(steps):
        for b in range(pictures):
            for y in range(height):
                for x in range(width):
                    row = activations.values[s, b, :, y, x] - recipe.normalisation.mean[s]
                    pre = recipe.encoder @ (row / recipe.normalisation.scale[s]) + recipe.bias
                    found[s, b, :, y, x] = torch.where(pre > recipe.threshold, pre, 0.0)
    return found


@pytest.fixture(params=[2**23, 60], ids=["at once", "a picture at a time"])
def observed(request, toys, monkeypatch):
    monkeypatch.setattr(activity, "CHUNK", request.param)
    recipe, activations = toys.recipe(), toys.activations()
    seen = []
    found = observe(recipe, activations, LABELS, 3, on_picture=seen.append)
    assert seen[-1] == 12 and len(seen) == (1 if request.param > 60 else 12)
    return found, dense(recipe, activations)


def test_every_figure_is_that_of_a_loop(observed):
    found, z = observed
    maps = z.mean(dim=0)  # B x F x H x W
    for f in range(5):
        peaks = maps[:, f].flatten(1).amax(dim=1)
        best = sorted(range(12), key=lambda b: -float(peaks[b]))[: activity.TOP]
        assert found.top[f].tolist() == best
        torch.testing.assert_close(found.peak[f], peaks[best])
        torch.testing.assert_close(found.heat[f], maps[best, f])
        assert float(found.fires[f]) == pytest.approx(float((z[:, :, f] > 0).float().mean()))
        for k, by_step in enumerate(found.by_class[f]):
            torch.testing.assert_close(by_step, z[:, LABELS.eq(k), f].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found.means, maps.mean(dim=(2, 3)))
    assert found.pictures.tolist() == [4, 4, 2]
    expected = np.corrcoef(maps.permute(1, 0, 2, 3).flatten(1).numpy())
    torch.testing.assert_close(found.alike, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_the_strongest_features_of_each_position_are_told(observed):
    found, z = observed
    order = z.mean(dim=0).permute(0, 2, 3, 1).sort(dim=3, descending=True)
    torch.testing.assert_close(found.strength, order.values)
    torch.testing.assert_close(z.mean(dim=0).permute(0, 2, 3, 1).gather(3, found.strongest), order.values)


def test_a_latent_that_never_fires_is_like_none(toys):
    recipe = toys.recipe()
    recipe.threshold[2] = 1e9
    found = observe(recipe, toys.activations(), LABELS, 3)
    assert not found.alike[2].any() and found.fires[2] == 0 and not found.heat[2].any()
    assert fire_together(found.alike)[2] == 0


def test_an_sae_tells_exactly_where_its_features_fire(toys):
    sae, activations = toys.sae(), toys.activations()
    own = torch.tensor([1, 4, 7, 8, 15])
    recipe = replace(
        toys.recipe(), features=own, encoder=sae.encoder[own], bias=sae.encoder_bias[own], decoder=sae.decoder[own],
        threshold=torch.full((5,), -1.0), normalisation=sae.normalisation,
    )  # fmt: skip
    with pytest.raises(DiffLensError, match="Connect the SAE as well"):
        observe(recipe, activations, LABELS, 3)
    found = observe(recipe, activations, LABELS, 3, sae)
    expected = torch.zeros(12, 20, 4)
    for step in range(3):
        latents = sae.encode(activations.values[step], step)
        every = torch.zeros(12, 4, 20).scatter_(2, latents.indices, latents.values)
        expected += every.transpose(1, 2) / 3
    torch.testing.assert_close(found.means, expected[:, own].mean(dim=2))


def test_only_so_many_pictures_are_looked_at(toys, monkeypatch):
    monkeypatch.setattr(activity, "PICTURES", 5)
    found = observe(toys.recipe(), toys.activations(), LABELS, 3)
    assert len(found.means) == 5 and found.top.max() < 5 and found.pictures.tolist() == [2, 2, 1]


def test_the_probes_read_the_last_step(toys):
    recipe, activations = toys.recipe(), toys.activations()
    h, n = activations.values[2], recipe.normalisation
    pooled = (h.mean(dim=(2, 3)) - n.mean[2]) / n.scale[2]
    expected = (pooled @ recipe.probe_weight[2].T + recipe.probe_bias[2]).argmax(dim=1)
    assert torch.equal(probe_classes(recipe, activations), expected) and len(expected.unique()) > 1
    assert probe_classes(replace(recipe, probe_weight=torch.zeros_like(recipe.probe_weight)), activations) is None


def test_activations_of_another_site_or_width_are_refused(toys):
    for other in (replace(toys.activations(), site="elsewhere"), toys.activations(width=7)):
        with pytest.raises(DiffLensError, match="Capture at the recipe's site"):
            observe(toys.recipe(), other, LABELS, 3)


def test_groups_fire_together_and_the_largest_comes_first():
    draw = torch.Generator().manual_seed(1)
    sources = torch.randn(3, 500, generator=draw)
    noise = 0.3 * torch.randn(7, 500, generator=draw)
    source = torch.tensor([0, 1, 1, 2, 1, 2, 0])
    rows = torch.cat([sources[source] + noise, torch.randn(1, 500, generator=draw)])
    groups = fire_together(torch.corrcoef(rows))
    assert groups.tolist() == [2, 1, 1, 3, 1, 3, 2, 0]
    assert fire_together(torch.ones(1, 1)).tolist() == [0]
