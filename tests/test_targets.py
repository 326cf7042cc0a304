"""Target mixes: what users may type, and how classes are dealt to pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from difflens_core.files import DiffLensError
from difflens_core.targets import Log, Targets, assign_targets, deal_for_ever, parse_numbers, parse_target, targets_of

CLASSES = ("Young", "adult", "senior")
MIXES = st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(any).map(lambda w: np.array(w) / sum(w))
SEEDS = st.integers(0, 2**32)


EXACT = [(7, 3), (9, 1), (1, 1), (1, 1, 1), (1, 1, 1, 1), (5, 3, 2), (4, 3, 3), (6, 3, 1), (4, 4, 2), (3, 3, 2, 2)]
ODD = [(0.512, 0.488), (0.21, 0.33, 0.46), (1 / np.pi, 1 - 1 / np.pi), (0.41376, 0.2, 0.38624), (0.3, 0.0, 0.7)]


def mixed(weights, seed: int = 0, name: str = "age", **more) -> Targets:
    shares = tuple((np.array(weights) / sum(weights)).tolist())
    return Targets(name, tuple(f"class {k}" for k in range(len(weights))), shares, seed, **more)


def stray(targets: Targets, count: int) -> float:
    """By how much a class's count in any window of the first `count` pictures strays from its share at most."""
    lead = np.cumsum(np.eye(len(targets.shares))[targets.first(count)] - targets.shares, axis=0)
    return np.ptp(np.vstack([np.zeros(len(targets.shares)), lead]), axis=0).max()


def cramers_v(one: np.ndarray, other: np.ndarray) -> float:
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1)
    table = table[table.any(axis=1)][:, table.any(axis=0)]
    if 1 in table.shape:
        return np.nan
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    return np.sqrt(((table - expected) ** 2 / expected).sum() / table.sum() / (min(table.shape) - 1))


@pytest.mark.parametrize("weights", [*EXACT[:2], (5, 3, 2), *ODD[1:3]])
def test_every_picture_has_each_class_with_the_chance_of_its_share(weights):
    seeds, places = 500, torch.tensor([0, 1, 2, 7, 63, 2**31])
    seen = torch.stack([mixed(weights, seed).of(places) for seed in range(seeds)]).numpy()
    shares = np.array(weights) / sum(weights)
    found = np.stack([(seen == k).mean(axis=0) for k in range(len(shares))], axis=1)
    assert (np.abs(found - shares) < 4 * np.sqrt(shares * (1 - shares) / seeds)).all()


@pytest.mark.parametrize("weights", EXACT)
def test_every_window_is_within_one_picture_of_every_share(weights):
    for seed in range(4):
        assert stray(mixed(weights, seed), 600) <= 1 + 1e-9


@pytest.mark.parametrize("weights", ODD)
def test_windows_of_other_mixes_are_as_near_as_any_deal_can_promise(weights):
    """2 - 1 / (K - 1), Tijdeman 1980; the parts of pictures that a round has no room for come on top."""
    targets = mixed(weights, 3)
    (order,), _ = deal_for_ever(*targets.deal)
    rounding = np.abs(np.bincount(order, minlength=len(weights)) / len(order) - targets.shares).max() * 500
    assert stray(targets, 500) <= 2 - 1 / (np.count_nonzero(weights) - 1) + rounding + 1e-9


@given(MIXES, SEEDS)
@example(np.array([1, 15, 42, 6, 42]) / 106, 0)
@settings(max_examples=60, deadline=None)
def test_of_a_known_number_of_pictures_every_prefix_is_within_one_of_the_quota_of_every_class(shares, seed):
    dealt = np.cumsum(np.eye(len(shares))[assign_targets(shares, 120, seed)], axis=0)
    quota = np.outer(np.arange(1, 121), shares)
    # No deal can promise less than 1 - 1 / (2K - 2) (Tijdeman 1980, the chairman assignment problem).
    assert np.abs(dealt - quota).max() <= 1 - 1 / (2 * len(shares) - 2) + 1e-6


@pytest.mark.parametrize("seeds", [(0, 0), (1, 7)], ids=["same seed", "other seed"])
@pytest.mark.parametrize(
    "pair",
    [((7, 3), (7, 3)), ((9, 1), (9, 1)), ((6, 4), (6, 4)), ((1, 1), (1, 1)), ((1, 1, 1), (1, 1, 1)),
     ((7, 3), (5, 3, 2)), ((5, 3, 2), (5, 3, 2)), ((70, 30), (69, 31)), ((1, 1), (1, 1, 1)), (ODD[0], ODD[1])],
)  # fmt: skip
def test_two_deals_on_one_run_have_no_more_to_do_with_each_other_than_shuffles(pair, seeds):
    shuffle = np.random.default_rng(0)
    runs = [(n, start) for n in (16, 60, 240) for start in range(0, 1500, 90)]
    found = {n: [] for n, _ in runs}
    for more in range(3):
        earlier = mixed(pair[0], seeds[0] + more, "look")
        one, other = earlier.first(2000), mixed(pair[1], seeds[1] + more, beside=earlier).first(2000)
        for n, start in runs:
            a, b = one[start : start + n], other[start : start + n]
            found[n].append((cramers_v(a, b), np.mean([cramers_v(a, shuffle.permutation(b)) for _ in range(4)])))
    for n in found:
        v, shuffled = np.nanmean(found[n], axis=0)
        assert v <= shuffled, n


def test_three_deals_are_independent_together_and_pairwise():
    first = mixed((1, 1), 0, "look")
    second = mixed((1, 1), 0, "tone", beside=first)
    third = mixed((1, 1), 0, "age", beside=second)
    a, b, c = (targets.first(240) for targets in (first, second, third))
    assert np.abs(np.bincount(4 * a + 2 * b + c, minlength=8) - 30).max() <= 4


def test_a_deal_beside_another_keeps_its_chances_and_strays_little():
    seen = []
    for seed in range(300):
        targets = mixed((7, 3), seed, beside=mixed((7, 3), seed, "look"))
        seen.append(targets.first(3))
    assert (np.abs(np.mean(seen, axis=0) - 0.3) < 4 * np.sqrt(0.21 / 300)).all()
    assert stray(targets, 1200) <= 2
    assert stray(mixed((7, 3), 0, beside=mixed((1, 1), 0, "look")), 1200) <= 1 + 1e-9


def test_a_deal_beside_another_is_another_deal_and_planned_pictures_do_not_count():
    earlier = mixed((7, 3), 0, "look")
    assert mixed((7, 3), beside=earlier) != mixed((7, 3))
    assert mixed((7, 3), beside=earlier).first(60).tolist() != mixed((7, 3)).first(60).tolist()
    planned = replace(earlier, asked=np.zeros(60, dtype=np.int64))
    assert mixed((7, 3), beside=planned).first(60).tolist() == mixed((7, 3)).first(60).tolist()


def test_the_attribute_the_classes_and_the_seed_decide_the_deal_and_nothing_else():
    deal = mixed((5, 3, 2)).first(60).tolist()
    assert deal == mixed((5, 3, 2)).first(60).tolist()
    assert deal not in (mixed((5, 3, 2), 1).first(60).tolist(), mixed((5, 3, 2), 0, "look").first(60).tolist())


def test_the_deal_is_the_same_on_every_machine():
    assert mixed((5, 3, 2), 4).first(20).tolist() == [1, 0, 0, 1, 0, 2, 1, 0, 0, 2, 1, 0, 0, 1, 2, 0, 1, 0, 0, 2]
    assert mixed((7, 3), 4, beside=mixed((5, 3, 2), 4, "look")).first(20).tolist() == [
        0,
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        1,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
        0,
    ]


def test_a_class_without_share_is_never_dealt_and_a_full_share_always():
    assert 1 not in mixed((3, 0, 7)).first(200)
    assert set(mixed((0, 1)).first(50)) == {1}
    assert set(mixed((1,)).first(5)) == {0}
    assert set(mixed((0, 1), beside=mixed((1, 1), 0, "look")).first(50)) == {1}
    assert assign_targets(np.array([0.5, 0.5]), 0, 0).shape == (0,)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_of_any_size_and_later_runs_get_the_same_classes(size):
    targets = mixed((5, 2, 3), 5, first_image=7)
    parts = [targets.of(part) for part in torch.arange(24).split(size)]
    expected = mixed((5, 2, 3), 5).first(31)[7:]
    assert torch.cat(parts).tolist() == expected.tolist() == targets.first(24).tolist()


def test_pictures_may_be_asked_for_in_any_order():
    targets = Targets("age", CLASSES, (0.5, 0.2, 0.3))
    assert targets.of(torch.tensor([9, 2, 2])).tolist() == targets.first(10)[[9, 2, 2]].tolist()


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("uniform", [1, 1, 1]),
        ("", [1, 1, 1]),
        (" Uniform\n", [1, 1, 1]),
        ("young", [1, 0, 0]),
        ("SENIOR", [0, 0, 1]),
        ("0.7, 0.2, 0.1", [7, 2, 1]),
        ("7 2 1", [7, 2, 1]),
        ("1;0;3", [1, 0, 3]),
        ("young: 1, senior: 3", [1, 0, 3]),
        ("Adult:2", [0, 1, 0]),
        ("50/30/20", [5, 3, 2]),
        ("2:1:1", [2, 1, 1]),
        ("70% 20 %, 10%", [7, 2, 1]),
        ("Equal", [1, 1, 1]),
        ("young 25 %, senior 75%", [1, 0, 3]),
        ("senior = 1; adult=1", [0, 1, 1]),
    ],
)
def test_a_target_can_be_typed_in_every_documented_form(text, shares):
    np.testing.assert_allclose(parse_target(text, CLASSES), np.array(shares) / sum(shares))


@pytest.mark.parametrize(
    "text",
    ["old", "1 2", "1 2 3 4", "-1 1 1", "0 0 0", "nan 1 1", "inf 1 1", "young: 1, old: 2", "young: x", "a:b:c", ","],
)
def test_a_target_that_makes_no_mix_is_refused_with_the_classes(text):
    with pytest.raises(DiffLensError, match="Young, adult, senior"):
        parse_target(text, CLASSES)


def test_a_name_that_is_nearly_right_is_asked_about():
    for text, meant in (("seniors", "senior"), ("yung", "young")):
        with pytest.raises(DiffLensError, match=f'"Young: 1, senior: 3". Did you mean {meant}'):
            parse_target(text, CLASSES)
    assert list(parse_target("more than 70: 2, 20-29 1", ("20-29", "more than 70"))) == [1 / 3, 2 / 3]


def test_numbers_for_each_class_are_one_for_all_or_one_each_in_order():
    assert parse_numbers(" 0.5 ", CLASSES, "strength") == [0.5] * 3
    assert parse_numbers("30, 0 -50.5", CLASSES, "strength") == [30, 0, -50.5]
    assert parse_numbers("10,0;30", CLASSES, "features", int) == [10, 0, 30]


@pytest.mark.parametrize("text", ["", "1, 2", "1 2 3 4", "a", "nan", "inf, 1, 1"])
def test_other_numbers_are_refused_with_the_classes_in_order(text):
    with pytest.raises(DiffLensError, match=r'strength ".*" is not understood.* 3 in the order Young, adult, senior'):
        parse_numbers(text, CLASSES, "strength")
    for odd in ("1.5", "1, -2, 3"):
        with pytest.raises(DiffLensError, match="Expected a whole number for all, or 3"):
            parse_numbers(odd, CLASSES, "features", int)


def test_targets_are_found_by_attribute_and_classes():
    parts = [Targets("age", CLASSES, (1.0, 0.0, 0.0)), Targets("look", ("a", "b"), (0.5, 0.5))]
    assert targets_of(parts, "look", ("a", "b")) is parts[1]
    with pytest.raises(DiffLensError, match="those of look \\(b, a\\) are needed"):
        targets_of(parts, "look", ("b", "a"))


def test_a_run_at_several_sites_is_counted_once_and_tells_every_sentence_once():
    log = Log()
    for run in (np.array([0, 1]), np.array([2, 3])):
        for site, said in (("middle", ["stretched"]), ("up", ["stretched", f"came late in run {run[0]}"])):
            log.tell(site, run, said)
    assert log.last(4).tolist() == [0, 1, 2, 3] and log.said == ["stretched", "came late in run 2"]


@pytest.mark.parametrize("prompts", [2, 3, 4, 5])
@pytest.mark.parametrize("shares", [(1, 1), (1, 1, 1), (1, 1, 1, 1), (7, 3), (5, 3, 2)])
def test_pictures_that_have_prompts_in_turn_are_balanced_for_each_prompt(shares, prompts):
    for seed in range(5):
        targets = mixed(shares, seed, log=Log(prompts=prompts))
        asked = targets.first(20 * prompts)
        for classes in (asked, *(asked[k::prompts] for k in range(prompts))):
            counts = np.bincount(classes, minlength=len(shares))
            assert np.abs(counts - len(classes) * np.array(shares) / sum(shares)).max() <= 2
