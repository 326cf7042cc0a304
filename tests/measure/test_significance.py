"""Tests against chance and sizes of samples: against scipy, enumeration and simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from difflens_core.measure import paired_test, pictures_for_fd, stuart_maxwell, target_p_value, wilson_interval
from difflens_core.measure.significance import fd_threshold, mcnemar, pictures_for_share


def outcomes(n: int, classes: int) -> np.ndarray:
    """All counts of n pictures in `classes` classes."""
    return np.array([counts for counts in product(range(n + 1), repeat=classes) if sum(counts) == n])


def test_p_value_agrees_with_scipy():
    target = np.array([0.5, 0.3, 0.2])
    assert target_p_value([60, 21, 19], target) == pytest.approx(stats.chisquare([60, 21, 19], 100 * target).pvalue)


@pytest.mark.parametrize("counts", [(3, 3, 2), (6, 0, 2), (1, 2, 5)])
def test_p_value_of_few_pictures_agrees_with_all_outcomes(counts):
    target, every = np.array([0.5, 0.3, 0.2]), outcomes(8, 3)
    strays = ((every - 8 * target) ** 2 / (8 * target)).sum(axis=1)
    found = ((np.array(counts) - 8 * target) ** 2 / (8 * target)).sum()
    exact = stats.multinomial(8, target).pmf(every)[strays >= found - 1e-9].sum()
    assert target_p_value(counts, target) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("n", [6, 10])
def test_few_fair_pictures_are_called_unfair_at_most_5_times_in_100(n):
    target, every = np.array([0.6, 0.4]), outcomes(n, 2)
    called = np.array([target_p_value(counts, target) < 0.05 for counts in every])
    assert stats.multinomial(n, target).pmf(every)[called].sum() <= 0.05 and called.any()


@pytest.mark.parametrize("target", [[1 / 3, 1 / 3, 1 / 3], [0.6, 0.25, 0.1, 0.05]])
def test_fair_pictures_are_called_unfair_5_times_in_100(target):
    counts = np.random.default_rng(0).multinomial(400, target, size=5000)
    called = [target_p_value(row, np.array(target)) < 0.05 for row in counts]
    assert np.mean(called) == pytest.approx(0.05, abs=0.012)


def test_classes_that_the_target_excludes():
    assert target_p_value([50, 50, 1], np.array([0.5, 0.5, 0])) == 0
    assert target_p_value([60, 40, 0], np.array([0.5, 0.5, 0])) == pytest.approx(stats.chisquare([60, 40]).pvalue)
    assert target_p_value([0, 9], np.array([0.0, 1.0])) == 1 and target_p_value([1, 8], np.array([0.0, 1.0])) == 0
    assert fd_threshold(9, np.array([0.0, 1.0])) == 0


@pytest.mark.parametrize("classes", [2, 4])
def test_threshold_of_a_uniform_target_is_the_chi_square_one(classes):
    known = np.sqrt(stats.chi2.ppf(0.95, classes - 1) / (500 * classes))
    assert fd_threshold(500, np.full(classes, 1 / classes)) == pytest.approx(known, abs=1e-12)


@pytest.mark.parametrize("n", [12, 500])
@pytest.mark.parametrize("target", [[0.5, 0.5], [0.8, 0.2], [0.25] * 4, [0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
def test_pictures_of_the_target_mix_stay_below_the_threshold_95_times_in_100(target, n):
    counts = np.random.default_rng(1).multinomial(n, target, size=20_000)
    below = np.mean(np.linalg.norm(counts / n - target, axis=1) <= fd_threshold(n, np.array(target)) + 1e-12)
    # Counts are whole numbers, so the share below a given value moves in jumps; for few pictures it may be above.
    assert below == pytest.approx(0.95, abs=0.012) if n == 500 else below >= 0.945


@pytest.mark.parametrize("target", [[0.5, 0.5], [0.25] * 4, [0.9, 0.1], [0.6, 0.3, 0.1]])
def test_pictures_needed_bring_the_threshold_to_the_fd(target):
    needed = pictures_for_fd(0.05, np.array(target))
    assert fd_threshold(needed, np.array(target)) == pytest.approx(0.05, rel=0.02)


def test_pictures_needed_bring_every_share_to_the_precision_and_no_fewer_do():
    def widest(n: int) -> float:
        low, high = wilson_interval(np.linspace(0, n, 101), n)
        return float((high - low).max() / 2)

    needed = pictures_for_share(0.04)
    assert widest(needed) <= 0.04 < widest(needed - 1)
    assert pictures_for_share(0.49) == 1


def test_paired_test_counts_what_changed():
    before, after = np.array([0, 0, 0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    found = paired_test(before, after, np.array([0.5, 0.5]))
    assert found.table == ((3, 3), (1, 1)) and found.n == 8
    assert found.changed == 0.5 and found.needed == 0.25 and found.ratio == 2
    assert found.changed_ci == pytest.approx(wilson_interval(4, 8))
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16) and found.method.startswith("McNemar")
    assert paired_test(before, before, np.array([0.75, 0.25])).ratio is None


def test_pictures_that_stay_show_no_shift():
    for classes in (2, 3):
        labels = np.arange(12) % classes
        assert paired_test(labels, labels, np.full(classes, 1 / classes)).p_value == 1


@pytest.mark.parametrize(("one_way", "other_way"), [(0, 6), (3, 9), (10, 10), (40, 60)])
def test_mcnemar_is_the_two_sided_binomial_test(one_way, other_way):
    n, least = one_way + other_way, min(one_way, other_way)
    exact = min(1, 2 * sum(stats.binom.pmf(k, n, 0.5) for k in range(least + 1)))
    assert mcnemar(np.array([[50, one_way], [other_way, 7]])) == pytest.approx(exact)


def test_stuart_maxwell_agrees_with_the_textbook_form_without_the_last_class():
    table = np.array([[20, 10, 5, 1], [3, 30, 15, 2], [0, 5, 40, 4], [1, 2, 7, 50]])
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    s = [
        [rows[i] + columns[i] - 2 * table[i, i] if i == j else -(table[i, j] + table[j, i]) for j in range(3)]
        for i in range(3)
    ]
    d = (rows - columns)[:3]
    assert stuart_maxwell(table) == pytest.approx(stats.chi2.sf(d @ np.linalg.inv(s) @ d, 3))


def test_stuart_maxwell_of_two_classes_and_of_an_unused_third_is_mcnemars_chi_square():
    table = np.array([[50, 30], [12, 20]])
    known = stats.chi2.sf((30 - 12) ** 2 / 42, 1)
    assert stuart_maxwell(table) == pytest.approx(known)
    assert stuart_maxwell(np.pad(table, ((0, 1), (0, 1)))) == pytest.approx(known)


def test_stuart_maxwell_calls_a_kept_mix_shifted_5_times_in_100():
    """Classes move in a ring, so that the mix is kept though the table is not symmetric."""
    p = np.array([[0.2, 0.12, 0.02], [0.02, 0.2, 0.12], [0.12, 0.02, 0.18]])
    tables = np.random.default_rng(2).multinomial(300, p.ravel(), size=4000).reshape(-1, 3, 3)
    assert np.mean([stuart_maxwell(table) < 0.05 for table in tables]) == pytest.approx(0.05, abs=0.015)


def test_no_mix_is_reached_with_fewer_changes_than_needed():
    rng = np.random.default_rng(3)
    for _ in range(50):
        before, after = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
        reached = np.bincount(after, minlength=4) / 30
        found = paired_test(before, after, reached)
        assert found.changed >= found.needed - 1e-12
        # Moving only what is too much reaches the mix with exactly that share.
        surplus = np.maximum(np.bincount(before, minlength=4) - np.bincount(after, minlength=4), 0).sum()
        assert found.needed == pytest.approx(surplus / 30)
