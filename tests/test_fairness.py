"""Fairness measures against their formulas, direct resampling and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from difflens_core.classifier import MISTAKE, NO_FACE
from difflens_core.fairness import (
    bootstrap_interval,
    fair_threshold,
    fairness_discrepancy,
    kept_attributes,
    kept_share,
    measure_fairness,
    one_hot,
    pixel_change,
)


def mix(n: int, shares: list[float], seed: int = 0) -> np.ndarray:
    """n pictures' soft class probabilities, classes drawn by `shares`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), n, p=shares)
    return 0.9 * one_hot(labels, len(shares)) + 0.1 * rng.dirichlet(np.ones(len(shares)), n)


def test_fd_is_the_distance_of_the_mean_probabilities_from_the_target():
    p, target = mix(50, [0.6, 0.3, 0.1]), [0.5, 0.25, 0.25]
    by_loops = math.sqrt(sum((sum(row[c] for row in p) / 50 - target[c]) ** 2 for c in range(3)))
    assert fairness_discrepancy(p, np.array(target)) == pytest.approx(by_loops, abs=1e-12)


def test_fd_of_known_mixes():
    half = np.array([0.5, 0.5])
    assert fairness_discrepancy(one_hot([0, 1], 2), half) == 0
    assert fairness_discrepancy(one_hot([0, 0], 2), half) == pytest.approx(math.sqrt(1 / 2))
    assert fairness_discrepancy(one_hot([0] * 9, 4), np.full(4, 0.25)) == pytest.approx(math.sqrt(3 / 4))


@pytest.mark.parametrize("stratified", [False, True])
def test_bootstrap_agrees_with_resampling_one_picture_at_a_time(stratified):
    p, target = mix(60, [0.6, 0.3, 0.1]), np.full(3, 1 / 3)
    strata = np.arange(60) % 3 if stratified else np.zeros(60, int)
    rng, fds = np.random.default_rng(9), []
    for _ in range(2000):
        rows = np.concatenate([rng.choice(np.flatnonzero(strata == s), (strata == s).sum()) for s in np.unique(strata)])
        fds.append(np.linalg.norm(p[rows].mean(axis=0) - target))
    found = bootstrap_interval(p, target, strata if stratified else None)
    assert found == pytest.approx(tuple(np.quantile(fds, [0.025, 0.975])), abs=0.015)


def test_bootstrap_interval_covers_the_true_fd_about_as_often_as_it_says():
    shares, target = [0.7, 0.2, 0.1], np.full(3, 1 / 3)
    truth = np.linalg.norm(np.array(shares) - target)
    runs = [one_hot(np.random.default_rng(run).choice(3, 200, p=shares), 3) for run in range(300)]
    intervals = [bootstrap_interval(run, target, draws=400) for run in runs]
    assert 0.90 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_pictures_that_all_obey_their_stratum_leave_no_uncertainty():
    labels = np.arange(90) % 3
    low, high = bootstrap_interval(one_hot(labels, 3), np.full(3, 1 / 3), labels)
    assert low == pytest.approx(0) and high == pytest.approx(0)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_fair_sampler_stays_below_the_threshold_95_times_in_100(classes):
    counts = np.random.default_rng(1).multinomial(500, np.full(classes, 1 / classes), size=20_000)
    fds = np.linalg.norm(counts / 500 - 1 / classes, axis=1)
    # Counts are whole numbers, so the share below a given value moves in jumps (about 0.01 here).
    assert np.mean(fds <= fair_threshold(500, classes)) == pytest.approx(0.95, abs=0.012)


def test_report_puts_soft_and_hard_figures_where_they_belong():
    p, target = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.array([0.5, 0.5])
    report = measure_fairness(p, target, "age", ("a", "b"), assigned=np.array([0, 1, 1, 0]))
    assert report.n == 4 and report.shares == (0.75, 0.25) and report.success == 0.75
    assert report.fd == pytest.approx(math.hypot(0.1, 0.1)) and report.fd_hard == pytest.approx(math.hypot(0.25, 0.25))
    assert report.fd_ci == bootstrap_interval(p, target, np.array([0, 1, 1, 0]))
    assert report.threshold == fair_threshold(4, 2)
    assert measure_fairness(p, target, "age", ("a", "b")).success is None


def test_kept_share_counts_pictures_whose_class_stays():
    assert kept_share([0, 1, 2, 1], [0, 2, 2, 1]) == 0.75


def test_kept_attributes_leaves_out_the_steered_one():
    before = {"age": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "tone": torch.tensor([[0.6, 0.4], [0.3, 0.7]])}
    after = {"age": torch.tensor([[0.1, 0.9], [0.2, 0.8]]), "tone": torch.tensor([[0.9, 0.1], [0.6, 0.4]])}
    assert kept_attributes(before, after, "age") == {"tone": 0.5}


def test_kept_attributes_counts_pictures_with_a_face_and_each_attribute_once():
    yes, no = [0.9, 0.1], [0.2, 0.8]
    before = {"race": [yes, yes, no], f"race{MISTAKE}": [no, no, no], "age": [yes, yes, no], NO_FACE: [0.0, 0.0, 1.0]}
    after = {"race": [yes, no, no], f"race{MISTAKE}": [no, no, no], "age": [no, yes, yes], NO_FACE: [0.0, 0.0, 0.0]}
    before, after = ({name: torch.tensor(rows) for name, rows in read.items()} for read in (before, after))
    assert kept_attributes(before, after, "age") == {"race": 0.5}
    assert kept_attributes(before, after, "race") == {"age": 0.5}
    none = {**after, NO_FACE: torch.ones(3)}
    assert kept_attributes(before, none, "age") == {}


def test_pixel_change_is_the_mean_of_the_pictures_rms_differences():
    before, after = np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 3))
    after[1, :2] = 0.8
    assert pixel_change(before, after) == pytest.approx((0 + 0.8 * math.sqrt(0.5)) / 2)
