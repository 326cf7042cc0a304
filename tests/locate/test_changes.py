"""Changes learned from pairs of one noise, against plain least squares in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.classifiers import NO_CLASS
from difflens_core.files import DiffLensError
from difflens_core.locate import Changes, alike_pairs, channel_rows, fit_changes
from difflens_core.locate import changes as module
from difflens_core.locate.changes import AS_THEY_ARE, SHARE, SHRINKAGE
from difflens_core.sae import Normalisation

TWINS, NOISES, WIDTH = 3, 40, 4
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


def by_hand(z: np.ndarray, twins: tuple) -> np.ndarray:
    """Coefficients S x K x F + 1 x F of rows z (S x B x P x F): ridge as more rows of least squares problems."""
    _, labels, others = twins
    x = np.concatenate([z[-1], np.ones((*z.shape[1:3], 1))], axis=2)
    of_class = [x[labels.numpy() == k].reshape(-1, WIDTH + 1) for k in range(3)]
    mean = sum(rows.T @ rows / len(rows) for rows in of_class) / 3
    ridge = (SHRINKAGE * np.trace(mean) / (WIDTH + 1)) ** 0.5 * np.eye(WIDTH + 1)
    first, second = (of.numpy() for of in alike_pairs(labels, TWINS, others))
    found = np.zeros((len(z), 3, WIDTH + 1, WIDTH))
    for s, rows in enumerate(z):
        towards = {}
        for k, m in combinations(range(3), 2):
            own = (labels.numpy()[first] == k) & (labels.numpy()[second] == m)
            change = (rows[second[own]] - rows[first[own]]).reshape(-1, WIDTH)
            either = np.concatenate(
                [x[first[own]].reshape(-1, WIDTH + 1), x[second[own]].reshape(-1, WIDTH + 1), ridge]
            )
            wanted = np.concatenate([change, change, np.zeros((WIDTH + 1, WIDTH))])
            towards[k, m] = np.linalg.lstsq(either, wanted, rcond=None)[0]
            towards[m, k] = -towards[k, m]
        for c in range(3):
            rest = [k for k in range(3) if k != c]
            parts = [(of_class[k], of_class[k] @ towards[k, c], 1.0) for k in rest]
            parts.append((of_class[c], 0 * of_class[c][:, :WIDTH], 2 * AS_THEY_ARE))
            weigh = [(share / len(rows)) ** 0.5 for rows, _, share in parts]
            a = np.concatenate([w * rows for w, (rows, _, _) in zip(weigh, parts, strict=True)])
            b = np.concatenate([w * of for w, (_, of, _) in zip(weigh, parts, strict=True)])
            found[s, c] = SHARE * np.linalg.lstsq(a, b, rcond=None)[0]
    return found


def test_changes_are_those_of_regressions_over_pairs_and_then_over_all_pictures(toys, twins, monkeypatch):
    activations, labels, others = twins
    monkeypatch.setattr(module, "MAPS", 30)
    norm = toys.normalisation(width=WIDTH)
    told: list[int] = []
    changes = fit_changes(activations, norm, channel_rows(norm), labels, CLASSES, others, told.append)
    z = np.stack([norm.apply(activations.values[s], s).numpy() for s in range(3)]).astype(np.float64)
    expected = by_hand(z, twins)
    x = np.concatenate([z[-1], np.ones((*z.shape[1:3], 1))], axis=2)
    latents = torch.from_numpy(z[-1]).float().transpose(1, 2)
    for s in range(3):
        for c in range(3):
            found = changes.change(latents, torch.full((len(latents),), c), s).transpose(1, 2).numpy()
            assert np.allclose(found, x @ expected[s, c], atol=2e-4)
    assert told[-1] == len(labels)
    assert changes.some(torch.tensor([0, 2])).maps.shape == (len(changes.maps), 2, len(changes.readout))


def test_batches_do_not_matter(toys, twins, monkeypatch):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    whole = fit_changes(activations, norm, channel_rows(norm), labels, CLASSES, others)
    monkeypatch.setattr(module, "ROWS", 4)  # one group of twins at once
    in_parts = fit_changes(activations, norm, channel_rows(norm), labels, CLASSES, others)
    latents, target = toys.random(3)(3, WIDTH, 4), torch.arange(3)
    assert torch.allclose(whole.change(latents, target, 1), in_parts.change(latents, target, 1), atol=1e-4)


def drawn_by_chance(generator: torch.Generator, noises: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Twins of two classes (pictures x positions x 3) and their labels.

    Where the first number says that something is, the class decides the second number; the third is the twin's own.
    """
    there = (torch.rand(noises, 6, generator=generator) < 0.5).float().repeat_interleave(2, dim=0)
    labels = torch.tensor([0, 1]).repeat(noises)
    own = torch.randn(2 * noises, 6, generator=generator)
    return torch.stack([there, there * (2.0 * labels[:, None] - 1), own], dim=2), labels


def test_a_change_is_where_the_class_shows_and_leaves_what_chance_made(monkeypatch):
    rows, labels = drawn_by_chance(torch.Generator().manual_seed(3), 400)
    values = rows.movedim(2, 1)[None, :, :, None, :]
    norm = Normalisation(torch.zeros(1), torch.zeros(1, 3), torch.ones(1))
    changes = fit_changes(
        Activations((values,), torch.zeros(1), "middle", twins=2), norm, channel_rows(norm), labels, ("a", "b"), {}
    )
    # Positions with something of class a and of class b, and one with nothing, each with something of its own.
    seen = torch.tensor([[1.0, -1.0, 2.0], [1.0, 1.0, -2.0], [0.0, 0.0, 2.0]]).T[None]
    to_b = changes.change(seen, torch.tensor([1]), 0)[0].T / SHARE
    assert to_b[0, 1] > 1.5, "something of class a becomes what class b has"
    assert to_b[1, 1].abs() < 0.5, "what is there already stays"
    assert to_b[2, 1].abs() < 0.3, "where there is nothing, nothing changes"
    assert to_b[:, 2].abs().max() < 0.1, "what is a twin's own is not drawn to the mean"
    by_the_first_alone = np.linalg.lstsq(
        np.c_[rows[::2].flatten(0, 1).numpy(), np.ones(6 * 400)],
        (rows[1::2] - rows[::2]).flatten(0, 1).numpy(), rcond=None,
    )[0]  # fmt: skip
    assert by_the_first_alone[2, 2] < -0.9, "a regression by the first picture alone would draw it there"


def test_too_few_pairs_are_said(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    hat = torch.arange(len(labels)) % TWINS  # no two twins are alike
    with pytest.raises(DiffLensError, match=r"0 pairs are young and adult with all else alike; at least 8 are needed"):
        fit_changes(activations, norm, channel_rows(norm), labels, CLASSES, {"hat": (("a", "b", "c"), hat)})


def test_changes_move_to_a_device_whole(toys, twins):
    activations, labels, others = twins
    norm = toys.normalisation(width=WIDTH)
    changes = fit_changes(activations, norm, channel_rows(norm), labels, CLASSES, others)
    assert isinstance(changes.to(torch.device("cpu")), Changes)
    assert changes.readout.shape == (min(module.PATTERNS, WIDTH + 1), WIDTH)
