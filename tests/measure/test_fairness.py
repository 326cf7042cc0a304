"""Fairness measures against their formulas and all outcomes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from difflens_core.classifiers.readings import MISTAKE, NO_FACE
from difflens_core.measure import (
    fairness_discrepancy,
    fd_interval,
    kept_attributes,
    measure_fairness,
    one_hot,
    pixel_change,
    share_intervals,
    target_p_value,
    total_variation,
)
from difflens_core.measure.fairness import (
    deviation_ratio,
    kept_share,
    kl_divergence,
    unbiased_squared_fd,
    worst_off_class,
)
from difflens_core.measure.significance import fd_threshold


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


def test_unbiased_square_is_right_on_average_over_all_outcomes():
    shares, target, n = np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.4, 0.2]), 6
    every = [counts for counts in product(range(n + 1), repeat=3) if sum(counts) == n]
    weights = stats.multinomial(n, shares).pmf(np.array(every))
    squares = [unbiased_squared_fd(one_hot(np.repeat([0, 1, 2], counts), 3), target) for counts in every]
    assert weights @ squares == pytest.approx(((shares - target) ** 2).sum(), abs=1e-12)
    p = np.array(every[9]) / n
    known = ((p - target) ** 2).sum() - (p * (1 - p)).sum() / (n - 1)
    assert squares[9] == pytest.approx(known, abs=1e-12)


def test_unbiased_square_of_dealt_out_pictures_takes_the_chance_within_strata():
    p, strata, target = mix(30, [0.6, 0.3, 0.1]), np.repeat([0, 1], [10, 20]), np.full(3, 1 / 3)
    parts = [p[strata == s] for s in (0, 1)]
    chance = sum((len(part) / 30) ** 2 * np.trace(np.cov(part.T)) / len(part) for part in parts)
    known = fairness_discrepancy(p, target) ** 2 - chance
    assert unbiased_squared_fd(p, target, strata) == pytest.approx(known, abs=1e-12)
    assert unbiased_squared_fd(p[:1], target) is None


def test_distances_of_known_mixes():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    assert total_variation(p, q) == pytest.approx(0.2)
    assert kl_divergence(p, q) == pytest.approx(stats.entropy(p, q))
    assert kl_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf and kl_divergence([1.0, 0.0], [0.5, 0.5]) == math.log(2)
    assert deviation_ratio(p, q) == pytest.approx(0.2 / 0.75)
    assert deviation_ratio([1, 0, 0, 0], np.full(4, 0.25)) == 1 == deviation_ratio([0, 0, 1], [0.6, 0.3, 0.1])
    assert worst_off_class(p, q) == (2, pytest.approx(0.4))
    assert worst_off_class([0.5, 0.5, 0.0], [0.6, 0.4, 0.0]) == (0, pytest.approx(0.5 / 0.6))


def test_report_puts_figures_where_they_belong():
    p, target = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.array([0.5, 0.5])
    assigned = np.array([0, 1, 1, 0])
    hard = one_hot([0, 0, 1, 0], 2)
    report = measure_fairness(p, target, "age", ("a", "b"), assigned)
    assert report.n == 4 and report.shares == (0.75, 0.25) and report.success == 0.75
    assert report.fd == pytest.approx(math.hypot(0.1, 0.1)) and report.fd_hard == pytest.approx(math.hypot(0.25, 0.25))
    assert report.fd_ci == fd_interval(p, target, assigned) and report.fd_hard_ci == fd_interval(hard, target, assigned)
    assert report.shares_ci == tuple(map(tuple, share_intervals(np.array([0, 0, 1, 0]), 2, assigned).tolist()))
    assert report.fd_squared == unbiased_squared_fd(hard, target, assigned)
    assert report.threshold == fd_threshold(4, target) and report.p_value == target_p_value([3, 1], target)
    assert report.total_variation == 0.25 and report.deviation_ratio == 0.5
    assert report.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (report.worst_off, report.worst_off_ratio) == ("b", 0.5)
    assert report.success_ci[0] < 0.75 < report.success_ci[1]


def test_report_on_unsteered_pictures_has_no_success_and_can_be_written_as_json():
    report = measure_fairness(one_hot([0, 0, 1, 0], 2), np.array([1.0, 0.0]), "age", ("a", "b"))
    assert report.success is None and report.success_ci is None
    assert report.kl is None and report.p_value == 0
    numbers = asdict(report)
    assert json.loads(json.dumps(numbers, allow_nan=False))["shares_ci"] == [list(ci) for ci in report.shares_ci]


@pytest.mark.parametrize("target", [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.3, 0.2]])
def test_interval_threshold_and_p_value_tell_the_same_of_clear_cases(target):
    for shares, fair in ((target, True), ([0.75, 0.15, 0.1], False)):
        labels = np.repeat([0, 1, 2], np.round(np.array(shares) * 120).astype(int))
        report = measure_fairness(one_hot(labels, 3), np.array(target), "age", ("a", "b", "c"))
        assert (report.fd_hard_ci[0] == 0) == fair == (report.fd_hard <= report.threshold) == (report.p_value > 0.05)


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
