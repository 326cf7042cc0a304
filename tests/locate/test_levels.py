"""Levels by class and by what else a picture shows, against plain least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflens_core.activations import FINEST, GRID, Activations, FramedActivations
from difflens_core.classifiers import NO_CLASS
from difflens_core.locate import channel_rows, fit_levels, latent_rows
from difflens_core.locate.attribution import SUPPORT
from difflens_core.locate.frames import SIDE
from difflens_core.locate.levels import PLACES, SHRINKAGE, in_few_maps, in_few_places
from difflens_core.sae import Normalisation

PICTURES, CLASSES = 90, 2


def drawn(seed: int = 1) -> tuple[torch.Tensor, dict]:
    """Labels of two classes, and of others: one of three, one that class 1 shows seldom, one it never does, one that
    never varies.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (PICTURES,), generator=generator)
    hair = torch.randint(3, (PICTURES,), generator=generator)
    chance = torch.rand(PICTURES, generator=generator)
    beard, tie = (chance < torch.where(labels == 0, 0.5, 0.14)).long(), ((chance < 0.5) & (labels == 0)).long()
    tie[20:22] = 1  # in all likelihood misread in one of the two
    labels[:5], hair[3:9] = NO_CLASS, NO_CLASS
    same = torch.zeros(PICTURES, dtype=torch.int64)
    binary = {"beard": beard, "hat": same}
    return labels, {"hair": (("a", "b", "c"), hair), "tie": (("bare", "tied"), tie)} | {
        name: (("no", "yes"), of) for name, of in binary.items()
    }


def by_least_squares(rows: np.ndarray, labels: torch.Tensor, others: dict) -> tuple[np.ndarray, np.ndarray]:
    """b_0 + b_c (K x X) and centred d (K x G x X) of rows (n x X): ridge as more rows of a least squares problem."""

    def code(of: np.ndarray, size: int) -> np.ndarray:
        return np.array([[(float(i == k) - 1 / size) if i >= 0 else 0.0 for k in range(size)] for i in of])

    known = labels.numpy() >= 0
    c, u, shared = code(labels.numpy(), CLASSES), [], []
    for names, of in others.values():
        u.append(code(of.numpy(), len(names)))
        for k in range(len(names)):
            shown = [int(((of == k) & (labels == own)).sum()) for own in range(CLASSES)]
            shared.append(u[-1][:, k] * (min(shown) >= SUPPORT and names != ("bare", "tied")))
    u, shared = np.concatenate(u, axis=1), np.stack(shared, axis=1)
    pairs = np.stack([(labels.numpy() == k)[:, None] * u for k in range(CLASSES)], axis=1).reshape(len(u), -1)
    x = np.concatenate([np.ones((len(u), 1)), c, shared, pairs], axis=1)[known]
    weight = np.full(x.shape[1], SHRINKAGE**0.5)
    weight[: 1 + CLASSES] = 1e-3
    target = np.concatenate([rows[known], np.zeros((x.shape[1], rows.shape[1]))])
    found = np.linalg.lstsq(np.concatenate([x, np.diag(weight)]), target, rcond=None)[0]
    classes, d = found[1 : 1 + CLASSES], found[1 + CLASSES + u.shape[1] :].reshape(CLASSES, u.shape[1], -1)
    return found[0] + classes - classes.mean(axis=0), d - d.mean(axis=0)


@pytest.mark.parametrize("kind", ["latents", "channels"])
def test_levels_and_effects_are_those_of_one_ridge_regression(toys, kind):
    activations, sae, (labels, others) = toys.activations(pictures=PICTURES), toys.sae(), drawn()
    features = torch.tensor([3, 7, 11, 15])
    rows_of = latent_rows(sae, features) if kind == "latents" else channel_rows(sae.normalisation)
    levels = fit_levels(activations, sae.normalisation, rows_of, labels, CLASSES, others)
    odd = (labels == 1) & (others["tie"][1] == 1)
    assert 0 < int(odd.sum()) < 3, "such pictures do not count"
    assert levels.attributes == {"hair": ("a", "b", "c"), "tie": ("bare", "tied"), "beard": ("no", "yes")}
    labels[odd] = NO_CLASS
    own, effects = levels.dense(), torch.einsum("skgr,rfd,dp->skgfp", levels.effects, levels.maps, levels.places)
    for s in range(3):
        x = sae.normalisation.apply(activations.values[s], s)
        if kind == "latents":
            pre = torch.nn.functional.linear(x, sae.encoder, sae.encoder_bias)
            active = (pre >= pre.topk(sae.k, dim=2).values[..., -1:]) & (pre > 0)
            x = torch.where(active, pre, 0.0)[..., features]
        rows = x.transpose(1, 2).flatten(1).double().numpy()
        expected, by_trait = by_least_squares(rows, labels, {name: others[name] for name in ("hair", "tie", "beard")})
        np.testing.assert_allclose(own[s].flatten(1), expected, atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(effects[s].flatten(2), by_trait, atol=1e-4)


def test_a_class_difference_that_turns_round_with_a_trait_is_found_and_read_off_the_picture(toys):
    """What tells the classes apart in pictures with one trait says the opposite in pictures with the other."""
    labels = torch.arange(80) % 2
    trait = torch.arange(80) // 2 % 2
    values = 0.01 * torch.randn(1, 80, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    values[:, :, 0] += (2.0 * trait - 1)[:, None, None]
    values[:, :, 1] += ((2.0 * trait - 1) * (2.0 * labels - 1))[:, None, None]
    activations = Activations(values, torch.zeros(1), "middle")
    normalisation = toys.normalisation(1, 4)
    others = {"trait": (("without", "with"), trait)}
    levels = fit_levels(activations, normalisation, channel_rows(normalisation), labels, 2, others)
    rows, pooled = channel_rows(normalisation)(values[0], 0)
    assert float((levels.dense()[0, 1] - levels.dense()[0, 0]).abs().max()) < 0.05, "all alike, there is no difference"
    u = levels.traits(pooled, 0)
    assert u[trait == 1][:, 1].min() > 0.4 and u[trait == 0][:, 1].max() < -0.4
    sure = torch.eye(2)[:, None].expand(-1, len(u), -1)
    found = (levels.level(sure[1], u, 0) - levels.level(sure[0], u, 0))[:, 1].mean(dim=1)
    expected = 2 * (2.0 * trait - 1) / normalisation.scale[0]
    assert float((found / expected).min()) > 0.75 and float((found / expected).max()) < 1.01, "shrunk a little"


def test_what_comes_with_a_class_goes_with_it(toys):
    """Channel 0 is a beard, which the second class never has: turned, a picture with a beard loses all of it."""
    labels, beard = torch.arange(600) % 2, (torch.arange(600) % 6 == 0).long()
    values = 0.01 * torch.randn(1, 600, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    values[:, :, 0] += beard[:, None, None]
    values[:, :, 1] += labels[:, None, None]
    beard[1] = 1  # misread: there is none in the picture
    normalisation = toys.normalisation(1, 4)
    others = {"beard": (("no", "yes"), beard)}
    levels = fit_levels(
        Activations(values, torch.zeros(1), "middle"), normalisation, channel_rows(normalisation), labels, 2, others
    )
    for shown in (0, 1):
        u = torch.tensor([[[0.5, -0.5]], [[-0.5, 0.5]]])[shown]
        gap = levels.level(torch.tensor([[-1.0, 1.0]]), u, 0)[0].mean(dim=1) * normalisation.scale[0]
        assert float(gap[0]) == pytest.approx(-shown, abs=0.15) and float(gap[1]) == pytest.approx(1, abs=0.1)


def test_without_other_attributes_the_levels_are_the_classes_means(toys):
    activations, sae, (labels, _) = toys.activations(pictures=PICTURES), toys.sae(), drawn()
    levels = fit_levels(
        activations, sae.normalisation, channel_rows(sae.normalisation), labels, CLASSES,
        {"hat": drawn()[1]["hat"]},
    )  # fmt: skip
    assert levels.attributes == {} and levels.effects.shape[2] == 0
    for s in range(3):
        rows = sae.normalisation.apply(activations.values[s], s).transpose(1, 2)
        means = torch.stack([rows[labels == k].mean(dim=0) for k in range(CLASSES)])
        torch.testing.assert_close(levels.dense()[s], means, atol=2e-3, rtol=2e-3)


def test_effects_are_kept_in_the_best_few_maps():
    effects = torch.randn(4, 2, 3, 5, 6, generator=torch.Generator().manual_seed(4))
    coefficients, maps = in_few_maps(effects, 7)
    u, s, v = np.linalg.svd(effects.reshape(24, 30).double().numpy(), full_matrices=False)
    best = (u[:, :7] * s[:7]) @ v[:7]
    np.testing.assert_allclose(torch.einsum("skgr,rfp->skgfp", coefficients, maps).reshape(24, 30), best, atol=1e-5)
    whole, more = in_few_maps(effects, 24)
    torch.testing.assert_close(torch.einsum("skgr,rfp->skgfp", whole, more), effects, atol=1e-5, rtol=1e-5)


def test_maps_are_made_of_the_best_few_patterns_over_the_positions():
    maps = torch.randn(4, 20, 50, generator=torch.Generator().manual_seed(4))
    own, places = in_few_places(maps)
    assert own.shape == (4, 20, PLACES)
    torch.testing.assert_close(places @ places.T, torch.eye(PLACES), atol=1e-5, rtol=1e-5)
    u, s, v = np.linalg.svd(maps.reshape(80, 50).double().numpy(), full_matrices=False)
    best = (u[:, :PLACES] * s[:PLACES]) @ v[:PLACES]
    np.testing.assert_allclose((own @ places).reshape(80, 50), best, atol=1e-5)
    few = maps[..., :3] @ torch.ones(3, 50)
    own, places = in_few_places(few)
    assert own.shape == (4, 20, 1), "nothing is kept that says nothing"
    torch.testing.assert_close(own @ places, few)


def test_in_frames_the_size_of_the_subject_is_a_trait_and_pictures_without_one_do_not_spoil_the_rest(toys):
    draw = torch.Generator().manual_seed(6)
    labels = torch.randint(CLASSES, (PICTURES,), generator=draw)
    side = 0.4 + 0.5 * torch.rand(PICTURES, 1, generator=draw)
    frames = torch.cat([torch.full((PICTURES, 2), 0.05), 0.05 + side.expand(-1, 2)], dim=1)
    values = toys.random(8)(1, PICTURES, 6, 4, 4) * 0.1
    values[0, :, 2] += (labels == 1).float()[:, None, None] * (3 * side[:, :, None] - 1.5)  # larger in the large
    values[0, 0], frames[0], labels[0] = 1e3, torch.nan, NO_CLASS
    plain = Activations(values, torch.tensor([0.0]), "middle")
    norm = Normalisation(torch.tensor([0.0]), torch.zeros(1, 6), torch.ones(1))
    levels = fit_levels(FramedActivations.of(plain, frames), norm, channel_rows(norm), labels, CLASSES, {})
    assert levels.dense().shape == (1, CLASSES, 6, GRID**2) and levels.attributes == {
        SIDE: ("small", "middle", "large")
    }
    gap = torch.einsum("gr,rfd->gfd", levels.effects[0, 1] - levels.effects[0, 0], levels.maps) @ levels.places
    assert float(gap[2, 2].mean() - gap[0, 2].mean()) > 0.5 and torch.isfinite(levels.dense()).all()
    assert gap[:, [0, 1, 3, 4, 5]].abs().max() < 0.2


@pytest.mark.parametrize("size", [(20, 24), (300, 1), (4, 80), (5, 40)])
def test_levels_of_large_maps_are_fitted_on_cells_and_laid_back(toys, size):
    """What is linear over the map comes back as it was, but for half a cell at its edges."""
    y, x = torch.meshgrid(torch.arange(size[0]) / size[0], torch.arange(size[1]) / size[1], indexing="ij")
    labels = torch.arange(12) % 2
    values = (labels[:, None, None] * (3 * y + 2 * x))[None, :, None].expand(2, -1, 6, -1, -1)
    activations = Activations(values.contiguous(), torch.arange(2) / 2, "middle")
    norm = Normalisation(activations.progress, torch.zeros(2, 6), torch.ones(2))
    levels = fit_levels(activations, norm, channel_rows(norm), labels, 2, {})
    assert levels.places.shape[0] <= FINEST and levels.positions == size[0] * size[1]
    found = levels.dense()[1, 1, 0].view(size)
    inner = tuple(slice(1 + side // 8, side - side // 8) if side > 20 else slice(None) for side in size)
    torch.testing.assert_close(found[inner], (3 * y + 2 * x)[inner], atol=0.08, rtol=0.02)
