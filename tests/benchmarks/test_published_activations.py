"""The published ways to steer by activations: their formulas against plain numpy, and what fitting promises."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402
import debias  # noqa: E402
from published_activations import (  # noqa: E402
    MARGIN,
    SHRINKAGE,
    EquiSteer,
    Gate,
    LinearAcT,
    MidSteer,
    affine_map,
    attention_sites,
    fit_equisteer,
    fit_linear_act,
    fit_midsteer,
    norm_sites,
)

from difflens_core.activations import capture  # noqa: E402
from difflens_core.networks import DenoiserSampler, Guidance, sample, start_noise  # noqa: E402

WIDTH, STEPS, CLASSES = 8, 3, 3  # of the context, of the sampling, of the attribute


@pytest.fixture(scope="module")
def guidance(toys):
    draw = toys.random(30)
    return Guidance(draw(12, 4, WIDTH), draw(1, 4, WIDTH), 2.0)


def of_class(images):
    return images % CLASSES


# --- Linear-AcT ---


def test_an_affine_map_is_the_line_through_the_sorted_samples(toys):
    draw = toys.random(31)
    source, target = draw(40, 5), 2 * draw(40, 5) + 1
    for channel, (weight, bias, low, high) in enumerate(affine_map(source, target).T.tolist()):
        x, y = np.sort(source[:, channel].numpy()), np.sort(target[:, channel].numpy())
        np.testing.assert_allclose([weight, bias], np.polyfit(x, y, 1), rtol=1e-4)
        assert [low, high] == [x[0], x[-1]]


def test_an_affine_map_of_fewer_target_samples_keeps_their_distribution(toys):
    source = toys.random(32)(60, 4)
    weight, bias, *_ = affine_map(source, (3 * source - 1)[source[:, :1].argsort(dim=0)[::2, 0]])
    torch.testing.assert_close(weight[0], torch.tensor(3.0), atol=0.1, rtol=0)
    torch.testing.assert_close(bias[0], torch.tensor(-1.0), atol=0.1, rtol=0)


def test_linear_act_moves_a_channel_within_the_range_of_its_source_only(toys):
    h, images, strength = toys.random(33)(4, 5, 2, 2), torch.tensor([4, 2, 0, 1]), 0.7
    maps = toys.random(34)(STEPS, CLASSES, 4, 5)
    maps[:, :, 2:] = torch.tensor([-0.3, 0.3])[:, None]
    found = LinearAcT("middle_block", maps, of_class, strength)(h, 1 / 3, images)
    moved = 0
    for i, image in enumerate(images.tolist()):
        for c in range(5):
            weight, bias, low, high = maps[1, image % CLASSES, :, c].tolist()
            mean = float(h[i, c].mean())
            shift = strength * (weight * mean + bias - mean) if low <= mean <= high else 0.0
            moved += shift != 0
            torch.testing.assert_close(found[i, c], h[i, c] + shift)
    assert 0 < moved < 20


class Seen:
    """An edit that only keeps what it is given, after the edits before it."""

    def __init__(self, site):
        self.site, self.steps = site, []

    def __call__(self, h, progress, images):
        self.steps.append(h)
        return h


def test_linear_act_gives_its_source_the_means_of_the_target_at_the_last_layer_and_every_step(model, guidance):
    """Of the pictures that it was fitted to, drawn again: the maps of all layers and steps work together."""
    classes, noise, sites = torch.arange(12) % 2, start_noise(12, 5, 16), norm_sites(model)
    store = capture(DenoiserSampler(model, STEPS, guidance), 12, 5, 4, sites)

    def draw(edits, pictures):
        sample(model, noise[pictures], STEPS, edits, guidance=guidance.of(pictures))

    maps = fit_linear_act(draw, [store.activations(site) for site in sites], classes)
    assert maps.shape == (6, STEPS, 2, 4, 32)
    edits = [LinearAcT(site, own, torch.ones_like) for site, own in zip(sites, maps, strict=True)]
    found, captured = Seen(sites[-1]), store.activations(sites[-1]).values.float()
    draw([*edits, found], (classes == 0).nonzero().flatten())

    def mean(values):
        return values.mean(dim=(1, 3, 4))  # S x C, over pictures and positions

    source, target = captured[:, classes == 0], captured[:, classes == 1]
    torch.testing.assert_close(mean(torch.stack(found.steps)), mean(target), atol=5e-3, rtol=0)
    assert (mean(source) - mean(target)).abs().max() > 0.1


# --- MidSteer ---


def test_midsteer_is_the_formula_of_the_paper_at_every_position(toys):
    activations, classes = toys.activations(pictures=30), torch.arange(30) % CLASSES
    means, readout = fit_midsteer(activations, classes)
    h, images, strength = toys.random(36)(4, 6, 2, 2), torch.tensor([3, 7, 1, 2]), 1.3
    found = MidSteer(means, readout, of_class, strength)(h, 2 / 3, images)
    values = activations.values[2].double().numpy()
    own = np.stack([values[classes.numpy() == k].mean(axis=0) for k in range(CLASSES)])
    centre = own.mean(axis=0)
    rows = (values - centre).transpose(0, 2, 3, 1).reshape(-1, 6)
    covariance = rows.T @ rows / len(rows)
    covariance += SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    clipped = 0
    for i, y, x in np.ndindex(4, 2, 2):
        row, target = h[i, :, y, x].double().numpy(), int(images[i]) % CLASSES
        for source in {0, 1, 2} - {target}:
            weight = np.linalg.solve(covariance, own[source, :, y, x] - centre[:, y, x])
            score = weight @ (row - centre[:, y, x]) / (weight @ (own[source, :, y, x] - centre[:, y, x]))
            clipped += score <= 0
            row = row - strength * max(score, 0) * (own[source] - own[target])[:, y, x]
        np.testing.assert_allclose(found[i, :, y, x].numpy(), row, rtol=1e-3, atol=1e-3)
    assert 0 < clipped < 32


def test_midsteer_turns_the_mean_of_one_class_into_that_of_the_other_and_leaves_the_other(toys):
    means, readout = fit_midsteer(toys.activations(pictures=20), torch.arange(20) % 2)
    steer = MidSteer(means, readout, torch.ones_like)
    torch.testing.assert_close(steer(means[0], 0.0, torch.arange(2)), means[0, 1].expand(2, -1, -1, -1))


# --- EquiSteer ---


def test_equisteer_is_fitted_by_differences_of_pairs(toys):
    named, unnamed, classes = toys.activations(seed=37), toys.activations(seed=38), torch.arange(12) % CLASSES
    directions, sizes, thresholds = fit_equisteer(named, unnamed, classes)
    told, untold = (a.values.double().numpy() for a in (named, unnamed))
    for step, k in np.ndindex(3, CLASSES):
        mine = np.flatnonzero(classes.numpy() == k)
        along = (told[step, mine] - untold[step, mine]).mean(axis=(0, 2, 3))
        along /= np.linalg.norm(along)
        size = np.tensordot(told[step, mine], along, (1, 0)).max(axis=(1, 2)).mean()
        without = np.tensordot(untold[step], along, (1, 0)).max(axis=(1, 2))
        threshold = max((size + without.mean()) / 2, MARGIN * without.max())
        np.testing.assert_allclose(directions[step, k].numpy(), along, atol=1e-5)
        np.testing.assert_allclose([sizes[step, k], thresholds[step, k]], [size, threshold], rtol=1e-4)


def by_hand(position, directions, size, target, strength):
    """EquiSteer of one position, by Gram and Schmidt."""
    cleared, basis = position.copy(), []
    for direction in directions:
        rest = direction - sum((b * (b @ direction) for b in basis), np.zeros_like(direction))
        basis.append(rest / np.linalg.norm(rest))
        cleared = cleared - basis[-1] * (basis[-1] @ cleared)
    steered = cleared + strength * size * directions[target]
    return steered * np.linalg.norm(position) / np.linalg.norm(steered)


def test_equisteer_clears_all_directions_and_adds_the_one_asked_for_where_the_gate_is_open(toys):
    draw, images, strength = toys.random(39), torch.tensor([3, 7, 1, 2]), 1.7
    directions = torch.nn.functional.normalize(draw(STEPS, CLASSES, 6), dim=2)
    sizes, first, later = draw(STEPS, CLASSES).abs(), draw(4, 6, 2, 2), draw(4, 6, 2, 2)
    gate = Gate("middle_block.1 update", directions[0], torch.tensor([2.0, 2.0, 2.0]))
    steer = EquiSteer(gate.site, directions, sizes, gate, of_class, strength)
    responses = np.einsum("bchw,kc->bkhw", first.numpy(), directions[0].numpy()).max(axis=(2, 3))
    is_open = (responses <= 2).all(axis=1)
    assert 0 < is_open.sum() < 4
    for h, step in ((first, 0), (later, 1)):  # the gate stays as it was at the first step
        found = steer(h, step / STEPS, images)
        for i, y, x in np.ndindex(4, 2, 2):
            position, target = h[i, :, y, x].double().numpy(), int(images[i]) % CLASSES
            own = directions[step].double().numpy()
            wanted = by_hand(position, own, float(sizes[step, target]), target, strength) if is_open[i] else position
            np.testing.assert_allclose(found[i, :, y, x].numpy(), wanted, rtol=1e-3, atol=1e-4)


# --- the comparison ---


def test_every_way_asks_every_picture_for_its_class_in_every_batch(model, guidance, monkeypatch):
    """Three batches, the last one smaller; what is fitted fits the network's sites."""
    monkeypatch.setattr(debias, "BATCH", 5)
    for module in (compare, debias):
        monkeypatch.setattr(module, "STEPS", STEPS)
    examples = compare.Examples(
        guidance, guidance.of(torch.arange(11, -1, -1)), torch.arange(12) % 3, start_noise(12, 8, 16)
    )
    monkeypatch.setattr(compare, "LEARNING", compare.LEARNING | {"seed": 8})
    maps = compare.maps_of(model, examples)
    assert all(torch.isfinite(tensor).all() for tensor in maps.values())
    sites = attention_sites(model)
    assert sites == ("middle_block.1 update", "middle_block.4 update")
    setting = compare.Setting(model, guidance, start_noise(12, 8, 16))
    for draw in (
        compare.by_linear_act(norm_sites(model), maps["linear_act"]),
        compare.by_midsteer(maps["means"], maps["readout"]),
        compare.by_equisteer(sites, maps["directions"], maps["sizes"], maps["thresholds"]),
    ):
        seen = set()

        def target_of(images, seen=seen):
            seen.add(tuple(images.tolist()))
            return of_class(images)

        found = draw(setting, target_of, 1.0)
        assert seen == {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11)}
        assert found.shape == (12, 3, 16, 16) and (found - compare.plain(setting)).abs().max() > 1e-3
