"""Intervals of shares and of FD: against scipy, exact distributions and direct search, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from difflens_core.measure import fd_interval, one_hot, share_intervals, wilson_interval
from difflens_core.measure.intervals import bootstrap_means, distance_interval

THIRDS = np.full(3, 1 / 3)


@pytest.mark.parametrize(("count", "n"), [(0, 20), (3, 20), (20, 20), (137, 500)])
def test_wilson_agrees_with_scipy(count, n):
    known = stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, n) == pytest.approx((known.low, known.high), abs=1e-12)


def test_wilson_holds_the_true_share_about_as_often_as_it_says():
    n, truths = 100, np.linspace(0.02, 0.98, 97)
    low, high = wilson_interval(np.arange(n + 1), n)
    held = [stats.binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() for p in truths]
    assert np.mean(held) == pytest.approx(0.95, abs=0.005) and min(held) > 0.89


def test_share_intervals_of_one_stratum_are_wilsons():
    labels = np.array([0, 0, 1, 2, 0, 1, 0])
    found = share_intervals(labels, 3)
    assert found == pytest.approx(np.stack(wilson_interval(np.array([4, 2, 1]), 7), axis=1))
    assert found == pytest.approx(share_intervals(labels, 3, np.zeros(7, int)))


ERRS = np.array([[0.9, 0.1, 0.0], [0.05, 0.9, 0.05], [0.3, 0.1, 0.6]])  # what pictures assigned each class show


def dealt(runs: int, per_class: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Labels of `runs` sets of pictures that were dealt out evenly to three classes and err by `ERRS`."""
    rng, strata = np.random.default_rng(seed), np.repeat(np.arange(3), per_class)
    counts = [[rng.multinomial(per_class, row) for row in ERRS] for _ in range(runs)]
    return [np.concatenate([np.repeat(np.arange(3), row) for row in run]) for run in counts], strata


def test_intervals_of_dealt_out_pictures_hold_the_truth_and_use_the_deal():
    sets, strata = dealt(runs=500, per_class=60)
    truth = ERRS.mean(axis=0)
    fd = np.linalg.norm(truth - THIRDS)
    shares = np.array([share_intervals(labels, 3, strata) for labels in sets])
    fds = np.array([fd_interval(one_hot(labels, 3), THIRDS, strata) for labels in sets])
    held = ((shares[..., 0] <= truth) & (truth <= shares[..., 1])).mean(axis=0)
    assert (held > 0.93).all()
    assert 0.93 <= np.mean((fds[:, 0] <= fd) & (fd <= fds[:, 1])) <= 0.995
    blind = np.array([share_intervals(labels, 3) for labels in sets[:20]])
    assert np.ptp(shares[:20], axis=2).mean() < 0.75 * np.ptp(blind, axis=2).mean()


@pytest.mark.parametrize("per_class", [1, 8, 100])
def test_pictures_that_all_show_their_class_still_leave_doubt(per_class):
    strata = np.repeat(np.arange(3), per_class)
    low, high = fd_interval(one_hot(strata, 3), THIRDS, strata)
    assert low == pytest.approx(0, abs=1e-9) and high > 0.3 / (per_class + 1)
    assert (np.ptp(share_intervals(strata, 3, strata), axis=1) > 0.3 / (per_class + 1)).all()


def test_no_misses_are_no_proof_that_there_are_none():
    """Each class is missed 1 time in 50, always for the same other: sets without a miss must allow for that."""
    rng, strata = np.random.default_rng(3), np.repeat([0, 1], 50)
    misses = rng.binomial(50, 0.02, size=600)
    labels = [np.where(np.arange(100) < miss, 1, strata) for miss in misses]  # only class 0 is missed
    truth = np.sqrt(2) * 0.01
    fds = np.array([fd_interval(one_hot(run, 2), np.full(2, 0.5), strata) for run in labels])
    assert (misses == 0).mean() > 0.3
    assert np.mean((fds[:, 0] <= truth) & (truth <= fds[:, 1])) >= 0.95


def test_bootstrap_of_counts_is_the_dirichlet_posterior():
    labels = np.repeat([0, 1, 2], [14, 5, 0])
    draws = bootstrap_means(one_hot(labels, 3), draws=20_000)
    exact = stats.dirichlet(np.array([14, 5, 0]) + 1 / 3)
    assert draws.sum(axis=1) == pytest.approx(np.ones(20_000))
    assert draws.mean(axis=0) == pytest.approx(exact.mean(), abs=0.003)
    assert np.cov(draws.T) == pytest.approx(exact.cov(), abs=3e-4)
    beta = stats.beta(14 + 1 / 3, 5 + 2 / 3)
    assert stats.kstest(draws[:, 0], beta.cdf).pvalue > 0.001


def test_bootstrap_of_soft_probabilities_has_the_moments_of_random_weights():
    p = np.random.default_rng(1).dirichlet([2, 1, 0.5], 40)
    draws = bootstrap_means(p, draws=20_000)
    rows, mass = np.concatenate([p, np.eye(3)]), np.concatenate([np.ones(40), THIRDS]) / 41
    mean = mass @ rows
    covariance = ((rows - mean).T * mass) @ (rows - mean) / 42
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.002) and np.cov(draws.T) == pytest.approx(
        covariance, rel=0.1
    )


def test_bootstrap_within_strata_adds_their_variances_by_weight():
    p, strata = np.random.default_rng(2).dirichlet([2, 1, 0.5], 60), np.repeat([0, 1], [20, 40])
    joint = np.cov(bootstrap_means(p, strata, draws=20_000).T)
    apart = [np.cov(bootstrap_means(p[strata == s], draws=20_000, seed=9).T) for s in (0, 1)]
    assert joint == pytest.approx(apart[0] / 9 + apart[1] * 4 / 9, rel=0.1)


def test_bootstrap_does_not_depend_on_how_it_is_cut_into_blocks(monkeypatch):
    p = np.random.default_rng(1).dirichlet([2, 1, 0.5], 40)
    whole = bootstrap_means(p, draws=50)
    monkeypatch.setattr("difflens_core.measure.intervals.BLOCK", 43 * 7)
    assert bootstrap_means(p, draws=50) == pytest.approx(whole, rel=1e-12)


def test_low_end_is_the_distance_that_an_error_turns_into_the_one_found():
    estimate, draws = np.array([0.5, 0.3, 0.2]), np.random.default_rng(5).dirichlet([25, 15, 10], 999)
    u, found = (estimate - THIRDS) / np.linalg.norm(estimate - THIRDS), np.linalg.norm(estimate - THIRDS)
    true = []
    for error in estimate - draws:
        across = np.linalg.norm(error - (error @ u) * u)
        start = max(-error @ u, -9)  # from here on |t u + error| only grows with t
        if across >= found:
            true.append(0)
        else:
            true.append(optimize.brentq(lambda t, e=error: np.linalg.norm(t * u + e) - found, start, 9))
    low, high = distance_interval(estimate, draws, THIRDS)
    assert low == pytest.approx(max(0, np.quantile(true, 0.025)), abs=1e-9)
    assert high == pytest.approx(np.quantile([np.linalg.norm(draw - THIRDS) for draw in draws], 0.975), abs=1e-12)


def test_fd_of_two_classes_far_from_the_target_has_the_interval_of_the_share():
    found = fd_interval(one_hot(np.repeat([0, 1], [150, 50]), 2), np.full(2, 0.5))
    share = stats.beta(150.5, 50.5).ppf([0.025, 0.975])
    assert found == pytest.approx(tuple(np.sqrt(2) * (share - 0.5)), abs=0.006)


@pytest.mark.parametrize("shares", [[1 / 3, 1 / 3, 1 / 3], [0.4, 0.33, 0.27], [0.7, 0.2, 0.1], [0.97, 0.02, 0.01]])
def test_fd_interval_holds_the_true_fd_about_as_often_as_it_says(shares):
    truth, rng = np.linalg.norm(np.array(shares) - THIRDS), np.random.default_rng(4)
    counts, times = np.unique(rng.multinomial(100, shares, size=600), axis=0, return_counts=True)
    found = [fd_interval(one_hot(np.repeat([0, 1, 2], row), 3), THIRDS) for row in counts]
    held = [low - 1e-12 <= truth <= high + 1e-12 for low, high in found]
    assert 0.93 <= np.average(held, weights=times) <= 0.995


def test_interval_of_soft_fd_holds_the_true_fd_about_as_often_as_it_says():
    rng, alpha = np.random.default_rng(6), np.array([1.5, 1.0, 0.5])
    truth, held = np.linalg.norm(alpha / 3 - THIRDS), []
    for _ in range(300):
        low, high = fd_interval(rng.dirichlet(alpha, 100), THIRDS)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.99


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_interval_is_a_point_or_leaves_out_what_was_found(data):
    classes = data.draw(st.integers(2, 5))
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=40)))
    strata = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=len(labels), max_size=len(labels)))
    target = np.array(data.draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes))) + 1e-3
    target /= target.sum()
    hard = one_hot(labels, classes)
    low, high = fd_interval(hard, target, strata)
    fd = np.linalg.norm(hard.mean(axis=0) - target)
    assert 0 <= low <= fd <= high and high - low > 1e-4
    shares = share_intervals(labels, classes, strata)
    assert (shares[:, 0] <= hard.mean(axis=0) + 1e-12).all() and (hard.mean(axis=0) <= shares[:, 1] + 1e-12).all()
    assert (np.ptp(shares, axis=1) > 1e-3).all() and shares.min() >= 0 and shares.max() <= 1
