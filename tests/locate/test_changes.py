"""Changes learned from pairs of one noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.classifiers import NO_CLASS
from difflens_core.files import DiffLensError
from difflens_core.locate import CHANGES, Changes, LabelledPictures, fit_changes
from difflens_core.locate import changes as module
from difflens_core.sae import Normalisation

TWINS, NOISES, WIDTH = 3, 40, 4
DECODER = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))
CLASSES = ("young", "adult", "senior")


@pytest.fixture
def twins(toys) -> tuple[Activations, torch.Tensor, dict]:
    """Captured twins with the classes that they show: two attributes beside, of which one is tied to the class."""
    pictures, generator = TWINS * NOISES, torch.Generator().manual_seed(1)
    labels = torch.randint(3, (pictures,), generator=generator)
    grey = (labels == 2).long()
    hat = torch.randint(2, (pictures,), generator=generator)
    labels[5], hat[9] = NO_CLASS, NO_CLASS
    captured = replace(toys.activations(pictures=pictures, width=WIDTH), twins=TWINS)
    return captured, labels, {"hair": (("own", "grey"), grey), "hat": (("no", "yes"), hat)}


def test_pairs_are_of_one_noise_and_differ_in_their_class_alone(twins):
    _, labels, others = twins
    first, second = module.alike_pairs(labels, TWINS, others)
    found = {*zip(first.tolist(), second.tolist(), strict=True)}
    hat = others["hat"][1]
    expected = {
        (i, j)
        for i in range(len(labels))
        for j in range(len(labels))
        if i // TWINS == j // TWINS and 0 <= labels[i] < labels[j] and hat[i] == hat[j]
    }
    assert found == expected and len(first) == len(found) > 20


def test_what_is_read_and_told_are_principal_components(toys, twins, monkeypatch):
    """Against singular values in float64: patterns of variance 1, and the least that is left out of the changes."""
    activations, labels, others = twins
    monkeypatch.setattr(module, "PATTERNS", 2)
    monkeypatch.setattr(module, "COURSES", 2)
    monkeypatch.setattr(module, "UPDATES", 1)
    norm = toys.normalisation(width=WIDTH)
    told: list[int] = []
    changes = fit_changes([LabelledPictures(activations, labels, others)], norm, DECODER, CLASSES, told.append)
    z = np.stack([norm.apply(activations.values[s], s).numpy() for s in range(3)]).astype(np.float64)  # S x B x P x F
    finished = z[-1].reshape(-1, WIDTH)
    read = finished @ changes.readout.numpy().T.astype(np.float64) + changes.offset.numpy()
    centred = finished - finished.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    assert np.allclose(read.mean(axis=0), 0, atol=1e-4) and np.allclose(np.cov(read.T, bias=True), np.eye(2), atol=1e-3)
    assert np.allclose(in_span(changes.readout.numpy()), in_span(directions), atol=1e-4)
    first, second = (of.numpy() for of in module.alike_pairs(labels, TWINS, others))
    more = z[:, second] - z[:, first]
    wanted = np.linalg.svd(more.reshape(-1, WIDTH))[2][:2]
    assert np.allclose(in_span(changes.maps.numpy()), in_span(least_squares(wanted)), atol=1e-4)
    courses = np.linalg.svd(more.reshape(len(more), -1), full_matrices=False)[0][:, :2]
    assert np.allclose(in_span(changes.amounts.numpy().T), in_span(courses.T), atol=1e-4)
    assert told[-1] == len(labels)
    assert changes.some(torch.tensor([0, 2])).maps.shape == (2, 2)


def least_squares(rows: np.ndarray) -> np.ndarray:
    """Latents (n x F) that decode to rows (n x W) but for what is small, as a least-squares problem with more rows."""
    decoder = DECODER.numpy().astype(np.float64)
    small = np.sqrt(module.RIDGE * np.square(decoder).sum(axis=1).mean()) * np.eye(len(decoder))
    return np.linalg.lstsq(np.vstack([decoder.T, small]), np.vstack([rows.T, np.zeros((len(small), len(rows)))]))[0].T


def in_span(rows: np.ndarray) -> np.ndarray:
    """The projection onto what rows (n x N) span."""
    return rows.T @ np.linalg.pinv(rows.T)


def test_batches_do_not_matter(toys, twins, monkeypatch):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    whole = fit_changes([LabelledPictures(activations, labels, others)], norm, DECODER, CLASSES)
    monkeypatch.setattr(module, "ROWS", 4)  # one group of twins at once
    in_parts = fit_changes([LabelledPictures(activations, labels, others)], norm, DECODER, CLASSES)
    latents, target = toys.random(3)(3, WIDTH, 2, 2), torch.arange(3)
    one, other = (of.change(of.told(latents, target), 1) for of in (whole, in_parts))
    assert torch.allclose(one, other, atol=1e-2)


def test_latents_decode_to_the_rows(toys):
    rows = toys.random(5)(3, WIDTH)
    assert np.allclose(module.in_latents(rows, DECODER).numpy(), least_squares(rows.numpy()), atol=1e-5)


def test_a_change_is_where_the_class_shows_and_goes_by_what_is_around(monkeypatch):
    """At a position that is marked the class decides a number by what stands beside it: no position alone tells."""
    generator = torch.Generator().manual_seed(3)
    there, beside = (torch.rand(400, 1, 8, generator=generator) < 0.3 for _ in range(2))
    labels = torch.tensor([0, 1]).repeat(400)
    values = torch.zeros(1, 800, 3, 1, 8)
    values[0, :, 0], values[0, :, 1] = (of.float().repeat_interleave(2, dim=0) for of in (there, beside))
    left = torch.nn.functional.pad(values[0, :, 1], (1, 0))[..., :-1]
    values[0, :, 2] = values[0, :, 0] * (2 * left - 1) * (2.0 * labels[:, None, None] - 1)
    norm = Normalisation(torch.zeros(1), torch.zeros(1, 3), torch.ones(1))
    seen = LabelledPictures(Activations((values,), torch.zeros(1), "middle", twins=2), labels, {})
    changes = fit_changes([seen], norm, torch.eye(3), ("a", "b"))
    found = changes.change(changes.told(values[0], 1 - labels), 0)
    wanted = values[0].unflatten(0, (-1, 2)).flip(1).flatten(0, 1) - values[0]
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean(), (
        "what twins differ by, there and not elsewhere"
    )
    stays = changes.change(changes.told(values[0], labels), 0)
    assert stays.square().mean() < 0.02 * wanted.square().mean(), "what shows the class already stays"
    again = fit_changes([seen], norm, torch.eye(3), ("a", "b"))
    assert all(torch.equal(getattr(changes, name), getattr(again, name)) for name in CHANGES), "the same every time"


def test_positions_that_lie_apart_are_read_alone(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    apart = replace(activations, size=(4, 4))
    assert fit_changes([LabelledPictures(apart, labels, others)], norm, DECODER, CLASSES).first.shape[1:3] == (1, 1)
    assert fit_changes([LabelledPictures(activations, labels, others)], norm, DECODER, CLASSES).first.shape[1:3] == (
        3,
        3,
    )


def test_too_few_pairs_are_said(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    hat = torch.arange(len(labels)) % TWINS  # no two twins are alike
    with pytest.raises(DiffLensError, match=r"0 pairs are young and adult with all else alike; at least 8 are needed"):
        fit_changes([LabelledPictures(activations, labels, {"hat": (("a", "b", "c"), hat)})], norm, DECODER, CLASSES)


def test_changes_move_to_a_device_whole(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    changes = fit_changes([LabelledPictures(activations, labels, others)], norm, DECODER, CLASSES)
    assert isinstance(changes.to(torch.device("cpu")), Changes)
    assert changes.readout.shape == (WIDTH, WIDTH)


def test_what_a_class_seldom_shows_may_change():
    """Beards: of every pair of classes one loses it, and must be let go."""
    labels = torch.tensor([0, 1]).repeat(200)
    beard, hat = torch.zeros(400, dtype=torch.int64), torch.zeros(400, dtype=torch.int64)
    beard[0:160:2], hat[100:260] = 1, 1
    beard[1] = 1  # the classifier's mistake
    others = {"beard": (("no", "yes"), beard), "hat": (("no", "yes"), hat)}
    assert len(module.alike_pairs(labels, 2, others)[0]) == 200
    hat[1::4] = 1 - hat[1::4]
    first, second = module.alike_pairs(labels, 2, others)
    assert len(first) == 100 and (hat[first] == hat[second]).all(), "what both show stays alike"


def test_pairs_are_weighed_until_they_drift_nowhere(toys):
    """By entropy balancing: of all weights with that mean, those with the largest entropy."""
    values = toys.random(8)(300, 3) + torch.tensor([0.4, 0.0, -0.2])
    weights = module.balanced(values)
    assert weights.sum() == pytest.approx(1, abs=1e-4) and (weights > 0).all()
    assert (weights @ values).abs().max() < 0.02 < values.mean(dim=0).abs().max()
    slopes = np.linalg.lstsq(np.hstack([values.numpy(), np.ones((300, 1))]), weights.log().numpy())[1]
    assert slopes < 1e-3, "their logarithms are linear in the values"
    assert torch.allclose(module.balanced(values[:, :0]), torch.full((300,), 1 / 300))


def test_two_sizes_are_learned_from_together(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    wide = replace(activations, shards=tuple(torch.cat([of, of], dim=4) for of in activations.shards))
    both = [LabelledPictures(of, labels, others) for of in (activations, wide)]
    told: list[int] = []
    changes = fit_changes(both, norm, DECODER, CLASSES, told.append)
    alone = fit_changes(both[:1], norm, DECODER, CLASSES)
    assert told[-1] == 2 * len(labels) and not torch.equal(changes.first, alone.first)
    assert torch.allclose(changes.readout, alone.readout, atol=1e-3), "the same pictures twice have the same patterns"
