"""Joint tables, undecided pictures and prompts: against loops and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from difflens_core.classifiers.readings import NO_FACE
from difflens_core.measure import clear_pictures, joint_report, measure_fairness, one_hot, undecided_bounds
from difflens_core.measure.groups import fd_bounds, joint_probabilities, prompt_report

CLASSES = {"age": ("young", "adult", "senior"), "tone": ("light", "dark"), "hair": ("short", "long")}


def readings(n: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.dirichlet(np.ones(len(classes)), n) for name, classes in CLASSES.items()}


def test_joint_probabilities_are_products():
    read = [*readings().values()]
    joint = joint_probabilities(read)
    assert joint.shape == (40, 3, 2, 2)
    assert joint[7, 2, 0, 1] == pytest.approx(read[0][7, 2] * read[1][7, 0] * read[2][7, 1])


def test_joint_table_counts_pictures_by_their_classes():
    read = readings()
    found = joint_report(read, CLASSES, {name: np.full(len(c), 1 / len(c)) for name, c in CLASSES.items()})
    counts = np.zeros((3, 2, 2))
    for i in range(40):
        counts[tuple(r[i].argmax() for r in read.values())] += 1
    assert np.array_equal(found.counts, counts) and found.attributes == ("age", "tone", "hair")
    assert found.report.classes[1] == "young, light, long" and found.report.attribute == "age x tone x hair"
    assert found.report.fd_hard == pytest.approx(np.linalg.norm(counts / 40 - 1 / 12))
    assert found.report.shares == pytest.approx(counts.ravel() / 40)


def test_joint_target_is_the_product_of_marginals_or_any_table():
    read = {name: readings()[name] for name in ("age", "tone")}
    shares = {"age": np.array([0.5, 0.3, 0.2]), "tone": np.array([0.6, 0.4])}
    asked = np.array([[0.3, 0.2], [0.18, 0.12], [0.12, 0.08]])
    by_marginals, by_table = joint_report(read, CLASSES, shares), joint_report(read, CLASSES, asked)
    assert by_marginals.report.target == pytest.approx(asked.ravel())
    assert by_table.report.fd == pytest.approx(by_marginals.report.fd)


def test_a_set_can_be_fair_in_each_attribute_and_not_in_both():
    one, other = np.array([0, 0, 1, 1] * 25), np.array([0, 0, 1, 1] * 25)
    read = {"tone": one_hot(one, 2), "hair": one_hot(other, 2)}
    half = np.full(2, 0.5)
    assert measure_fairness(read["tone"], half, "tone", CLASSES["tone"]).fd_hard == 0
    joint = joint_report(read, CLASSES, {"tone": half, "hair": half}).report
    assert joint.fd_hard == pytest.approx(0.5) and joint.fd_hard_ci[0] > 0.4 and joint.p_value < 1e-9


def test_clear_pictures_have_a_face_and_a_likely_class():
    read = {
        "tone": torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.3, 0.7], [0.05, 0.95]]),
        NO_FACE: torch.tensor([0.0, 0.0, 0.0, 1.0]),
    }
    assert clear_pictures(read, "tone").tolist() == [True, True, True, False]
    assert clear_pictures(read, "tone", 0.6).tolist() == [False, True, True, False]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
    st.integers(1, 6),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
def test_fd_bounds_are_the_extremes_over_all_ways_to_decide(counts, undecided, target):
    target = np.array(target) / sum(target)
    every = [(i, j, undecided - i - j) for i in range(undecided + 1) for j in range(undecided + 1 - i)]
    n = sum(counts) + undecided
    fds = [np.linalg.norm((np.array(counts) + way) / n - target) for way in every]
    assert fd_bounds(np.array(counts), undecided, target) == pytest.approx((min(fds), max(fds)), abs=1e-12)


def test_undecided_pictures_are_counted_apart():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    found = undecided_bounds(p, np.full(2, 0.5), np.array([True, True, False, True]))
    assert found.n == 4 and found.undecided == 1 and found.counts == (2, 1) and found.shares == (0.5, 0.25)
    assert found.fd_low == 0 and found.fd_high == pytest.approx(np.sqrt(2) / 4)
    none = undecided_bounds(p, np.full(2, 0.5), np.ones(4, bool))
    assert none.fd_low == none.fd_high == measure_fairness(p, np.full(2, 0.5), "tone", ("a", "b")).fd_hard


def test_prompts_count_the_same_whatever_their_number_of_pictures():
    labels, prompts = np.array([0, 0, 0, 0, 0, 1]), ["nurse", "nurse", "nurse", "nurse", "pilot", "pilot"]
    found = prompt_report(one_hot(labels, 2), np.full(2, 0.5), "tone", ("a", "b"), prompts)
    assert found.prompts == ("nurse", "pilot") and [report.n for report in found.reports] == [4, 2]
    assert found.mean == pytest.approx((np.sqrt(0.5) + 0) / 2)
    assert found.mean_squared == pytest.approx((0.5 + 0 - 0.25 * 2) / 2)
    exact = [stats.binom(n, 0.5).expect(lambda k, n=n: np.sqrt(2) * abs(k / n - 0.5)) for n in (4, 2)]
    assert found.by_chance == pytest.approx(np.mean(exact), abs=0.01)
    assert found.mean_ci[0] <= found.mean <= found.mean_ci[1]


def test_prompts_of_steered_pictures_know_of_the_deal():
    labels, prompts = np.arange(80) % 2, np.repeat(["nurse", "pilot"], 40)
    labels[3] = 0
    arguments = one_hot(labels, 2), np.full(2, 0.5), "tone", ("a", "b"), prompts
    blind, dealt = prompt_report(*arguments), prompt_report(*arguments, assigned=np.arange(80) % 2)
    assert [report.success for report in dealt.reports] == [39 / 40, 1]
    assert np.ptp(dealt.mean_ci) < 0.7 * np.ptp(blind.mean_ci) and dealt.mean == blind.mean


def test_mean_over_prompts_of_fair_pictures_is_what_chance_gives_and_its_square_is_none():
    rng, prompts = np.random.default_rng(1), np.repeat([f"prompt {i}" for i in range(12)], 25)
    found = [
        prompt_report(one_hot(rng.integers(0, 3, 300), 3), np.full(3, 1 / 3), "age", CLASSES["age"], prompts)
        for _ in range(60)
    ]
    # 720 FDs, which stray by 0.075, their squares by 0.027: three standard errors.
    assert np.mean([report.mean for report in found]) == pytest.approx(found[0].by_chance, abs=0.0085)
    assert np.mean([report.mean_squared for report in found]) == pytest.approx(0, abs=0.003)


def test_interval_of_the_mean_over_prompts_tells_how_far_it_moves_with_other_pictures():
    rng, shares = np.random.default_rng(2), [0.9, 0.7, 0.5]
    prompts = np.repeat(["nurse", "pilot", "cook"], 40)
    exact = np.mean([stats.binom(40, p).expect(lambda k: np.sqrt(2) * abs(k / 40 - 0.5)) for p in shares])
    held = []
    for _ in range(150):
        labels = np.concatenate([rng.random(40) > p for p in shares]).astype(int)
        low, high = prompt_report(one_hot(labels, 2), np.full(2, 0.5), "tone", ("a", "b"), prompts).mean_ci
        held.append(low <= exact <= high)
    assert 0.90 <= np.mean(held) <= 1
