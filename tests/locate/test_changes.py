"""Changes learned from pairs of one noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.classifiers import NO_CLASS
from difflens_core.files import DiffLensError
from difflens_core.locate import CHANGES, Changes, alike_pairs, fit_changes
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
    first, second = alike_pairs(labels, TWINS, others)
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
    changes = fit_changes(activations, norm, DECODER, labels, CLASSES, others, told.append)
    z = np.stack([norm.apply(activations.values[s], s).numpy() for s in range(3)]).astype(np.float64)  # S x B x P x F
    finished = z[-1].reshape(-1, WIDTH)
    read = finished @ changes.readout.numpy().T.astype(np.float64) + changes.offset.numpy()
    centred = finished - finished.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    assert np.allclose(read.mean(axis=0), 0, atol=1e-4) and np.allclose(np.cov(read.T, bias=True), np.eye(2), atol=1e-3)
    assert np.allclose(in_span(changes.readout.numpy()), in_span(directions), atol=1e-4)
    first, second = (of.numpy() for of in alike_pairs(labels, TWINS, others))
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
    whole = fit_changes(activations, norm, DECODER, labels, CLASSES, others)
    monkeypatch.setattr(module, "ROWS", 4)  # one group of twins at once
    in_parts = fit_changes(activations, norm, DECODER, labels, CLASSES, others)
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
    changes = fit_changes(
        Activations((values,), torch.zeros(1), "middle", twins=2), norm, torch.eye(3), labels, ("a", "b"), {}
    )
    found = changes.change(changes.told(values[0], 1 - labels), 0)
    wanted = values[0].unflatten(0, (-1, 2)).flip(1).flatten(0, 1) - values[0]
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean(), (
        "what twins differ by, there and not elsewhere"
    )
    stays = changes.change(changes.told(values[0], labels), 0)
    assert stays.square().mean() < 0.02 * wanted.square().mean(), "what shows the class already stays"
    again = fit_changes(
        Activations((values,), torch.zeros(1), "middle", twins=2), norm, torch.eye(3), labels, ("a", "b"), {}
    )
    assert all(torch.equal(getattr(changes, name), getattr(again, name)) for name in CHANGES), "the same every time"


def test_positions_that_lie_apart_are_read_alone(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    apart = replace(activations, size=(4, 4))
    assert fit_changes(apart, norm, DECODER, labels, CLASSES, others).first.shape[1:3] == (1, 1)
    assert fit_changes(activations, norm, DECODER, labels, CLASSES, others).first.shape[1:3] == (3, 3)


def test_too_few_pairs_are_said(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    hat = torch.arange(len(labels)) % TWINS  # no two twins are alike
    with pytest.raises(DiffLensError, match=r"0 pairs are young and adult with all else alike; at least 8 are needed"):
        fit_changes(activations, norm, DECODER, labels, CLASSES, {"hat": (("a", "b", "c"), hat)})


def test_changes_move_to_a_device_whole(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    changes = fit_changes(activations, norm, DECODER, labels, CLASSES, others)
    assert isinstance(changes.to(torch.device("cpu")), Changes)
    assert changes.readout.shape == (WIDTH, WIDTH)
