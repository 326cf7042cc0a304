"""Charts and grids: size and type, that the data show, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflens_core.files import DiffLensError
from difflens_core.report import bar_chart, image_grid, line_chart
from difflens_core.report.charts import PALETTE, ticks

SHARES = {"light": {"before": 0.6, "after": 0.3}, "dark": {"before": 0.1, "after": 0.3}}
SIZE = (440, 720, 3)


def count(image: np.ndarray, colour: str) -> int:
    """Pixels of exactly that colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == wanted).all(axis=-1).sum())


def test_charts_are_pictures_with_a_white_background():
    for chart in (bar_chart("Shares", SHARES), line_chart("Loss", {"loss": [(0, 1), (1, 0.5)]}, "step", "loss")):
        assert chart.shape == SIZE and chart.dtype == np.uint8
        assert (chart[-1, -1] == 255).all() and (chart[0, 0] == 255).all()


def test_twice_the_height_is_twice_the_bar():
    low, high = (
        count(bar_chart("t", {"a": {"before": h, "after": 0}, "b": {"before": 1, "after": 0}}), PALETTE[0])
        for h in (0.25, 0.75)
    )
    whole = count(bar_chart("t", {"a": {"before": 1, "after": 0}, "b": {"before": 1, "after": 0}}), PALETTE[0]) / 2
    assert (high - low) / whole == pytest.approx(0.5, abs=0.03)


def test_reference_and_whiskers_are_drawn():
    plain = bar_chart("t", SHARES)
    assert (plain != bar_chart("t", SHARES, 0.25)).any()
    assert (plain != bar_chart("t", SHARES, errors={"light": {"before": (0.5, 0.55)}})).any()


def test_a_line_has_whiskers_where_they_are_given_and_the_range_asked_for():
    line = {"a": [(0, 0.2), (1, 0.4)], "b": [(0, 0.3), (1, 0.3)]}
    wide = line_chart("t", line, "x", "y", y_range=(0, 1))
    whiskers = line_chart("t", line, "x", "y", {"a": [(0.1, 0.6), (0.4, 0.9)]}, (0, 1))
    changed = (wide != whiskers).any(axis=(0, 2)).nonzero()[0]
    half = SIZE[1] // 2
    assert 5 <= (changed < half).sum() <= 15 and 5 <= (changed > half).sum() <= 15  # narrow, at both points
    assert (wide != line_chart("t", line, "x", "y")).any()


def test_groups_with_bars_of_their_own_are_coloured_by_group():
    chart = bar_chart("Features", {"young": {"12": 1.0, "7": 0.5}, "senior": {"99": 0.7}})
    assert count(chart, PALETTE[0]) > count(chart, PALETTE[1]) > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(bad):
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        bar_chart("t", {"a": {"b": bad}})
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        bar_chart("t", {"a": {"b": 1.0}}, errors={"a": {"b": (0, bad)}})
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        line_chart("t", {"a": [(0, bad)]}, "x", "y")
    with pytest.raises(DiffLensError, match="NaN or infinite"):
        line_chart("t", {"a": [(0, 1)]}, "x", "y", {"a": [(0, bad)]})


def test_nothing_to_draw_is_refused():
    for draw in (lambda: bar_chart("t", {}), lambda: line_chart("t", {"a": []}, "x", "y")):
        with pytest.raises(DiffLensError, match="nothing to draw"):
            draw()


def test_odd_charts_are_drawn():
    name = "a name that is far too long to fit " * 9
    assert bar_chart(name, {name: {name: 0.0}}, 0.5).shape == SIZE
    assert bar_chart("t", {"a": {str(i): -i for i in range(200)}}).shape == SIZE
    assert bar_chart("t", {"a": {f"series {i}": 1e-9 * i for i in range(8)}}).shape == SIZE
    assert line_chart(name, {name + str(i): [(5, 5)] for i in range(12)}, name, name).shape == SIZE


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
def test_any_finite_heights_can_be_drawn(heights):
    assert bar_chart("t", {"g": {str(i): h for i, h in enumerate(heights)}}).shape == SIZE


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_enclose_the_data_in_few_steps(a, b):
    low, high = sorted((a, b))
    marks = ticks(low, high)
    slack = 1e-8 * max(abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert 2 <= len(marks) <= 9


def test_grid_shows_every_picture_enlarged_and_in_order():
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(64, 1).repeat(64, 2).repeat(3, 3) * 40
    grid = image_grid([pictures], [""], columns=3)
    assert grid.shape == (2 * (128 + 6) + 6, 3 * (128 + 6) + 6, 3) and grid.dtype == np.uint8
    centres = [grid[6 + 64 + i // 3 * 134, 6 + 64 + i % 3 * 134, 0] for i in range(5)]
    assert centres == [0, 40, 80, 120, 160]


def test_grid_keeps_large_pictures_and_adds_a_title():
    picture = np.zeros((1, 100, 200, 3), np.uint8)
    plain, titled = image_grid([picture], [], 16), image_grid([picture], ["Before"], 16)
    assert plain.shape == (112, 212, 3)
    assert titled.shape == (142, 212, 3) and (titled[6:36] < 128).any()


def test_grid_refuses_what_it_cannot_place():
    one, other = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 9, 8, 3), np.uint8)
    with pytest.raises(DiffLensError, match="8 x 8, 8 x 9 pixels"):
        image_grid([one, other], [], 4)
    for rows in ([], [one, one[:0]]):
        with pytest.raises(DiffLensError, match="empty"):
            image_grid(rows, [], 4)
