"""Judgements of people: the pairs they are shown, the file that keeps them, and the figures made of them."""

from __future__ import annotations

import csv
import unicodedata
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from difflens_core.files import DiffLensError
from difflens_core.measure import (
    KINDS,
    Judged,
    Judgement,
    Pair,
    add_judgement,
    check_name,
    judged_figures,
    last_said,
    order_for,
    pairs_of,
    read_judgements,
    wilson_interval,
    with_catches,
)
from difflens_core.measure.judgements import HEAD, LONGEST_NAME
from difflens_core.measure.preferences import agreement

SIDES, CHOICES = ("first", "second"), ("first", "neither", "second")


def said(number: int, better: str, *changed: str, judge: str = "anna", left: str = "first") -> Judgement:
    names = ("before", "after")
    return Judgement("2030-01-02", judge, f"p{number}", number, False, *names, left, better, changed or ("nothing",))


def judged(*judgements: Judgement, pairs: int = 4, catches: int = 0, equal: tuple[int, ...] = ()) -> dict:
    shown = tuple(Pair(number, f"p{number}", number in equal) for number in range(1, pairs + catches + 1))
    return judged_figures(Judged(("before", "after"), "age", shown, catches, last_said(judgements, shown)))


# --- pairs ---


def test_pairs_are_known_by_their_pictures_and_places():
    first, second = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    second[1] = first[1]
    pairs = pairs_of(first, second)
    assert [pair.number for pair in pairs] == [1, 2, 3] and [pair.equal for pair in pairs] == [False, True, False]
    assert pairs_of(first[:2], second[:2]) == pairs[:2]
    others = [pairs_of(second, first)[::2], pairs_of(first[::-1], second[::-1])[::2]]
    changed = second.copy()
    changed[2, 0, 0, 0] ^= 1
    others.append(pairs_of(first, changed)[2:])
    marks = [pair.mark for found in (pairs, *others) for pair in found]
    assert len(set(marks)) == len(marks)
    both = with_catches(first, second, 2, seed=1)
    assert all((side[:3] == pictures).all() for side, pictures in zip(both, (first, second), strict=True))
    assert (both[0][3:] == both[1][3:]).all() and [pair.equal for pair in pairs_of(*both)[3:]] == [True, True]
    assert len(with_catches(first, second, 64, seed=1)[0]) == 6, "no picture is a catch twice"


def test_every_judge_has_an_order_and_half_of_the_pictures_on_either_side():
    orders = [order_for(judge, 31, seed) for judge in ("anna", "ben") for seed in (0, 1)]
    for order in orders:
        assert sorted(number for number, _ in order) == list(range(31))
        assert sum(left for _, left in order) == 16
    assert not any(one == other for one, other in combinations(orders, 2))
    assert orders[0] == order_for("anna", 31, 0)
    left = np.mean([[side for _, side in sorted(order_for(f"judge {i}", 8, 0))] for i in range(400)], axis=0)
    assert (abs(left - 0.5) < 0.1).all(), "which pair has its first picture on the left is chance"


# --- the file ---

kinds = st.one_of(st.just(("nothing",)), st.sets(st.sampled_from(list(KINDS)[1:]), min_size=1).map(
    lambda some: tuple(kind for kind in KINDS if kind in some)))  # fmt: skip


def usable(name: str) -> str | None:
    try:
        return check_name(name, "the name")
    except DiffLensError:
        return None


visible = st.characters(exclude_categories=["C", "Z"])
names = st.text(visible, min_size=1, max_size=LONGEST_NAME).map(usable).filter(bool)
judgements = st.builds(
    Judgement, time=st.just("2030-01-02T03:04:05+00:00"), judge=names, pictures=st.just("p0123456789ab"),
    pair=st.integers(1, 999), equal=st.booleans(), first=names, second=names, left=st.sampled_from(SIDES),
    better=st.sampled_from(CHOICES), changed=kinds,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(judgements, min_size=1, max_size=4))
@example([Judgement("2030", 'a "b", c;\\', "p0", 1, True, "ü, é", "שלום", "first", "neither", ("hair", "quality"))])
def test_what_is_written_is_read_and_no_cell_is_a_formula(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("csv") / "sub" / "judged.csv"
    for one in found:
        add_judgement(path, one)
    assert read_judgements(path) == found
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == HEAD and len(rows) == 1 + len(found)
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if unicodedata.normalize("NFKC", cell)[:1] in {*"=+-@\t\r\n"}]


@pytest.mark.parametrize("name", ["", "  ", "=1+1", "+1", "-1", "@sum", "=1", "a\nb", "a\tb", "x" * 41, " =1"])
def test_names_that_a_table_does_not_bear_are_refused(name):
    with pytest.raises(DiffLensError, match="the name .* cannot be used. Give 1 to 40"):
        check_name(name, "the name")
    assert check_name("  Zoë, 3rd ", "the name") == "Zoë, 3rd"


def test_a_file_that_a_spreadsheet_saved_again_is_read(tmp_path):
    path = tmp_path / "judged.csv"
    add_judgement(path, said(1, "second", "hair"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip())  # a mark in front, no end of the last line
    add_judgement(path, said(2, "first", "attribute"))
    assert read_judgements(path) == [said(1, "second", "hair"), said(2, "first", "attribute")]
    assert read_judgements(tmp_path / "none.csv") == []


def line(**cells: str) -> str:
    good = dict(zip(HEAD, ["2030", "anna", "p1", "1", "no", "before", "after", "first", "second", "hair"], strict=True))
    return ",".join((good | cells).values())


BAD = {
    "another file": ("a,b\n1,2\n", "begins with 'a,b', expected 'time,judge,"),
    "semicolons": (";".join(HEAD) + "\n", "Save it as CSV with commas"),
    "not UTF-8": (",".join(HEAD).encode() + b"\n\xff\n", "no text in UTF-8"),
    "a short line": ("2030,anna\n", "line 2: 2 cells, expected 10"),
    "an unknown choice": (line(better="both"), "line 2: better is 'both', expected first, second, neither"),
    "an unknown side": (line(left="top"), "line 2: left is 'top'"),
    "an unknown kind": (line(changed="hair nose"), "line 2: changed is 'hair nose', expected 'nothing', or some of"),
    "no kind": (line(changed=""), "line 2: changed is ''"),
    "nothing and something": (line(changed="nothing hair"), "line 2: changed is 'nothing hair'"),
    "no number": (line(pair="one"), "line 2: invalid literal"),
    "a formula": (line(judge="=1"), "line 2: judge '=1' cannot be used"),
    "an open quote": (line(judge='"an'), "line 2: unexpected end of data"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path, case):
    content, message = BAD[case]
    if isinstance(content, str):
        content = (content if case in ("another file", "semicolons") else ",".join(HEAD) + "\n" + content).encode()
    path = tmp_path / "judged.csv"
    path.write_bytes(content)
    with pytest.raises(DiffLensError, match="judged.csv") as caught:
        read_judgements(path)
    assert message in str(caught.value)
    if message in ("begins", "no text in UTF-8"):
        with pytest.raises(DiffLensError):
            add_judgement(path, said(1, "first"))
    assert path.read_bytes() == content


# --- figures ---


def test_figures_of_one_judge_are_those_counted_by_hand():
    found = judged(
        said(1, "second", "attribute", "hair"), said(2, "second", "attribute", left="second"),
        said(3, "first", "hair"), said(3, "neither"), said(9, "first", "quality"),
    )  # fmt: skip
    together = found["together"]
    assert (found["pairs"], found["judged"], found["answers"]) == (4, 3, {"anna": 3})
    assert together["better"] == {"first": 0, "neither": pytest.approx(1 / 3), "second": pytest.approx(2 / 3)}
    assert together["changed"]["attribute"] == pytest.approx(2 / 3) and together["changed"]["hair"] == pytest.approx(
        1 / 3
    )
    assert together["changed"]["nothing"] == pytest.approx(1 / 3), "the later word counts, and other pictures do not"
    assert together["better_ci"]["second"] == pytest.approx([float(end) for end in wilson_interval(2, 3)])
    assert together["p_value"] == pytest.approx(2 * comb(2, 0) / 4)
    assert found["by_judge"] == {"anna": together} and found["agreement"] is found["alpha"] is None
    assert found["left"] == {"n": 2, "share": 0.5, "share_ci": pytest.approx([float(e) for e in wilson_interval(1, 2)])}
    assert found["looked"] is None


def test_a_pair_counts_once_as_most_of_its_judges_say():
    found = judged(
        said(1, "second", "hair"), said(1, "second", "hair", judge="ben"), said(1, "first", judge="eve"),
        said(2, "second", "hair"), said(2, "first", judge="ben"),
        said(3, "neither"), said(3, "neither", "clothes", judge="ben"), said(3, "second", judge="eve"),
    )  # fmt: skip
    assert found["together"]["better"] == {"first": 0, "neither": pytest.approx(2 / 3), "second": pytest.approx(1 / 3)}
    changed = {kind: share for kind, share in found["together"]["changed"].items() if share}
    assert changed == {"nothing": pytest.approx(2 / 3), "hair": pytest.approx(1 / 3)}
    assert found["by_judge"]["ben"]["better"]["first"] == pytest.approx(1 / 3)
    assert found["agreement"] == pytest.approx((1 + 0 + 1) / (3 + 1 + 3)), "of all twos of judges on a pair"


def test_pictures_that_are_the_same_show_who_looks():
    found = judged(
        said(1, "neither"), said(2, "second", "hair"), said(5, "neither"), said(6, "first", "nothing"),
        said(6, "neither", "hair", judge="ben"), catches=2, equal=(1, 5, 6),
    )  # fmt: skip
    assert found["pairs"] == 4 and found["judged"] == 2 and found["answers"] == {"anna": 2}, (
        "added pairs count for this alone"
    )
    assert found["looked"]["n"] == 4 and found["looked"]["share"] == 0.5


def test_pairs_that_nobody_judged_have_no_figures():
    found = judged()
    assert found["together"] is found["left"] is found["looked"] is None
    assert found["by_judge"] == found["answers"] == {} and found["judged"] == 0


def test_alpha_is_krippendorffs():
    """His own example of nominal data with gaps, four observers and twelve units: 0.743."""
    units = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    assert agreement(units)["alpha"] == pytest.approx(0.743, abs=5e-4)


answers = st.lists(st.lists(st.sampled_from(CHOICES), max_size=4), max_size=6)


@settings(max_examples=100, deadline=None)
@given(answers)
def test_agreement_is_what_counting_all_twos_gives(found):
    told = agreement(found)
    twos = [(a == b) for unit in found for a, b in combinations(unit, 2)]
    assert told["agreement"] == (sum(twos) / len(twos) if twos else None)
    # Brute force over all ordered twos, within units and among everything that can be paired.
    units = [unit for unit in found if len(unit) > 1]
    values = [value for unit in units for value in unit]
    inside = sum(
        (a != b) / (len(unit) - 1) for unit in units for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j
    )
    across = [a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j]
    if not any(across):
        assert told["alpha"] is None
    else:
        assert told["alpha"] == pytest.approx(1 - (inside / len(values)) / (sum(across) / len(across)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=12))
def test_the_sign_test_is_what_all_ways_to_toss_coins_give(choices):
    found = judged(*(said(i, choice) for i, choice in enumerate(choices, start=1)), pairs=12)
    ones, n = choices.count("first"), len(choices) - choices.count("neither")
    likely = [comb(n, k) for k in range(n + 1)]
    assert found["together"]["p_value"] == pytest.approx(sum(way for way in likely if way <= likely[ones]) / 2**n)
