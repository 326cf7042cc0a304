"""Correction for the classifier's errors: against CLEAM's formula, a general solver and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize

from difflens_core.files import DiffLensError
from difflens_core.measure import correct_for_errors, parse_confusion, solve_shares
from difflens_core.measure.correction import CONDITION_LIMIT, confusion_counts, error_rates

AGES = ("young", "adult", "senior")
HALF, THIRDS = np.full(2, 0.5), np.full(3, 1 / 3)
RATES = {
    2: np.array([[0.85, 0.15], [0.03, 0.97]]),
    3: np.array([[0.9, 0.08, 0.02], [0.1, 0.8, 0.1], [0.0, 0.05, 0.95]]),
}


def labels_of(counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(
    "text",
    ["90 8 2\n5 80 15\n0 7 93", " 90,8,2 \n\n5; 80; 15\n0\t7 93\n", "Young: 90 8 2\nadult: 5, 80, 15\nsenior:0 7 93"],
)
def test_confusion_counts_are_read_as_people_type_them(text):
    assert parse_confusion(text, AGES).tolist() == [[90, 8, 2], [5, 80, 15], [0, 7, 93]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("90 8 2\n5 80 15", "have 2 lines"),
        ("", "have 0 lines"),
        ("90 8 2\n5 80\n0 7 93", 'line 2 of the confusion counts, "5 80"'),
        ("90 8 2\n5 80 1.5\n0 7 93", "line 2"),
        ("90 8 2\n5 -80 15\n0 7 93", "line 2"),
        ("90 8 2\nsenior: 5 80 15\nadult: 0 7 93", "line 2"),
        ("90 8 2\n0 0 0\n0 7 93", "no labelled picture of adult"),
    ],
)
def test_confusion_counts_that_do_not_fit_are_refused(text, says):
    with pytest.raises(DiffLensError, match=says):
        parse_confusion(text, AGES)


def test_confusion_counts_of_labelled_pictures():
    true, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    assert confusion_counts(true, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_two_classes_are_corrected_by_cleams_formula():
    rates, found = RATES[2], np.array([0.6, 0.4])
    share = (found[0] - rates[1, 0]) / (rates[0, 0] - rates[1, 0])
    assert solve_shares(found, rates) == pytest.approx([share, 1 - share])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(0, 10_000))
def test_shares_that_a_classifier_distorts_are_recovered(shares, seed):
    shares = (np.array(shares) + 1e-3) / (np.array(shares) + 1e-3).sum()
    rates = 0.6 * np.eye(4) + 0.4 * np.random.default_rng(seed).dirichlet(np.ones(4), 4)
    assert solve_shares(shares @ rates, rates) == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize("found", [[0.98, 0.01, 0.01], [0.0, 0.5, 0.5], [0.01, 0.02, 0.97]])
def test_shares_that_no_mix_explains_get_the_nearest_one(found):
    found, rates = np.array(found), RATES[3]
    known = optimize.minimize(
        lambda p: 1e4 * ((rates.T @ p - found) ** 2).sum(),
        THIRDS,
        method="SLSQP",
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solve_shares(found, rates) == pytest.approx(known.x, abs=1e-4)
    assert solve_shares(found, rates).min() >= 0 and solve_shares(found, rates).sum() == pytest.approx(1)


@pytest.mark.parametrize("truth", [[0.5, 0.5], [0.9, 0.1], [0.98, 0.02], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
def test_the_bias_of_the_classifier_is_removed_and_intervals_hold_the_truth(truth):
    truth = np.array(truth)
    rates, target, rng = RATES[len(truth)], np.full(len(truth), 1 / len(truth)), np.random.default_rng(7)
    fd, found, shares_held, fd_held = np.linalg.norm(truth - target), [], [], []
    for run in range(250):
        labels = labels_of(rng.multinomial(400, truth @ rates))
        confusion = np.array([rng.multinomial(100, row) for row in rates])
        result = correct_for_errors(labels, target, confusion, AGES[: len(truth)], seed=run)
        found.append(result.shares)
        limits = np.array(result.shares_ci)
        shares_held.append((limits[:, 0] <= truth) & (truth <= limits[:, 1]))
        fd_held.append(result.fd_ci[0] - 1e-12 <= fd <= result.fd_ci[1])
    assert np.mean(found, axis=0) == pytest.approx(truth, abs=0.015)
    assert np.mean(shares_held, axis=0).min() >= 0.91 and np.mean(fd_held) >= 0.91


def test_a_fair_set_that_the_classifier_shows_as_biased_comes_out_fair():
    seen = labels_of((2000 * HALF @ RATES[2]).astype(int))
    confusion = (1000 * RATES[2]).astype(int)
    shown = np.bincount(seen) / 2000
    result = correct_for_errors(seen, HALF, confusion, ("a", "b"))
    assert abs(shown[0] - 0.5) > 0.05 and result.shares == pytest.approx((0.5, 0.5), abs=1e-3)
    assert result.fd_ci[0] == 0 and result.plausible and result.labelled == (1000, 1000)
    assert result.condition == pytest.approx(np.linalg.cond(RATES[2]), rel=1e-3)


def test_few_labelled_pictures_make_the_interval_wide():
    labels = labels_of(np.array([240, 160]))
    narrow, wide = (
        np.ptp(correct_for_errors(labels, HALF, n * np.array([[9, 1], [1, 9]]), ("a", "b")).shares_ci[0])
        for n in (1000, 2)
    )
    assert wide > 1.5 * narrow


def test_a_perfect_classifier_changes_nothing():
    labels = labels_of(np.array([50, 30, 20]))
    result = correct_for_errors(labels, THIRDS, 10**6 * np.eye(3, dtype=int), AGES)
    assert result.shares == pytest.approx((0.5, 0.3, 0.2)) and result.condition == pytest.approx(1)


def test_the_deal_of_steered_pictures_narrows_the_interval():
    strata = np.repeat([0, 1], 100)
    labels = np.where(np.arange(200) % 20 == 0, 1 - strata, strata)
    confusion = np.array([[950, 50], [50, 950]])
    blind, dealt = (
        np.ptp(correct_for_errors(labels, HALF, confusion, ("a", "b"), s).shares_ci[0]) for s in (None, strata)
    )
    assert dealt < 0.7 * blind


@pytest.mark.parametrize("low", [0, 1])
def test_shares_that_cannot_come_from_the_errors_counted_are_marked_and_keep_some_doubt(low):
    """The classifier calls none of 500 pictures class `low`, though it should call a fifth so by mistake."""
    result = correct_for_errors(np.full(500, 1 - low), HALF, np.array([[80, 20], [20, 80]]), ("a", "b"))
    assert not result.plausible and result.shares[low] == 0
    assert (np.ptp(result.shares_ci, axis=1) > 1e-3).all()
    assert result.fd == pytest.approx(np.sqrt(0.5)) and result.fd_ci[0] < result.fd_ci[1] <= np.sqrt(0.5) + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=3).filter(any), st.integers(0, 10_000))
@example([0, 0, 24], 24)  # an interval of which next to nothing lies above 0
def test_no_interval_is_a_point_or_leaves_out_the_corrected_figure(counts, seed):
    rng = np.random.default_rng(seed)
    confusion = np.array([rng.multinomial(30, 0.7 * np.eye(3)[i] + 0.3 * rng.dirichlet(np.ones(3))) for i in range(3)])
    result = correct_for_errors(labels_of(np.array(counts)), THIRDS, confusion, AGES)
    for share, (low, high) in zip(result.shares, result.shares_ci, strict=True):
        assert 0 <= low <= share <= high <= 1 and high - low > 1e-4
    assert 0 <= result.fd_ci[0] <= result.fd + 1e-12 and result.fd <= result.fd_ci[1] + 1e-12
    assert np.ptp(result.fd_ci) > 1e-4 and sum(result.shares) == pytest.approx(1)


def test_a_classifier_that_hardly_tells_classes_apart_is_refused():
    labels = labels_of(np.array([50, 50]))
    with pytest.raises(DiffLensError, match="apart too badly"):
        correct_for_errors(labels, HALF, np.array([[54, 46], [46, 54]]), ("a", "b"))
    with pytest.raises(DiffLensError, match="apart too badly"):
        correct_for_errors(labels, HALF, np.array([[5, 5], [5, 5]]), ("a", "b"))
    with pytest.raises(DiffLensError, match="no labelled picture of b"):
        correct_for_errors(labels, HALF, np.array([[5, 5], [0, 0]]), ("a", "b"))
    assert correct_for_errors(labels, HALF, np.array([[56, 44], [44, 56]]), ("a", "b")).condition < CONDITION_LIMIT


def test_errors_grow_at_most_by_the_condition_number():
    rates, rng = RATES[3], np.random.default_rng(0)
    limit = np.linalg.cond(error_rates(rates * 100))
    for _ in range(50):
        truth, step = rng.dirichlet(np.full(3, 9)), rng.normal(size=3) * 1e-4
        step -= step.mean()
        moved = solve_shares(truth @ rates + step, rates) - truth
        assert np.linalg.norm(moved) / np.linalg.norm(truth) <= limit * np.linalg.norm(step) / np.linalg.norm(
            truth @ rates
        )
