"""Fairness measures against their formulas, direct resampling and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from difflens_core.classifier import MISTAKE, NO_FACE
from difflens_core.fairness import (
    fairness_discrepancy,
    kept_attributes,
    kept_share,
    measure_fairness,
    one_hot,
    pixel_change,
)
from difflens_core.intervals import fd_interval
from difflens_core.significance import fd_threshold


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


def test_report_puts_soft_and_hard_figures_where_they_belong():
    p, target = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.array([0.5, 0.5])
    report = measure_fairness(p, target, "age", ("a", "b"), assigned=np.array([0, 1, 1, 0]))
    assert report.n == 4 and report.shares == (0.75, 0.25) and report.success == 0.75
    assert report.fd == pytest.approx(math.hypot(0.1, 0.1)) and report.fd_hard == pytest.approx(math.hypot(0.25, 0.25))
    assert report.fd_ci == fd_interval(p, target, np.array([0, 1, 1, 0]))
    assert report.threshold == fd_threshold(4, target)
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
