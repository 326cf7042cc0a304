"""The report in words."""

from __future__ import annotations

import numpy as np
import torch
from made_up import ATTRIBUTES, full, numbers_of

from difflens_core.measure import pictures_for_fd
from difflens_core.report import report_text
from difflens_core.report.rows import fairness_rows


def test_text_is_narrow_and_shows_every_figure():
    found = full()
    text = report_text(found)
    tables = text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    assert max(map(len, tables.splitlines())) <= 66
    for row in fairness_rows(found):
        (line,) = [line for line in text.split("\n\n")[1].splitlines() if line.startswith(f"{row.label:26}")]
        assert line[26:].split() == " ".join(row.figures).split(), row.label
    assert "KID needs 100 pictures" in text and "left out, no face" in text
    assert f"{found['kept']['tone']:.1%}" in text and f"{found['paired']['changed']:.1%} of the pictures" in text


def test_chance_is_named_only_where_it_is_a_poor_explanation():
    fair = torch.eye(3)[[0, 0, 1, 2] * 10]
    skewed = torch.eye(3)[[2] * 40]
    text = report_text(numbers_of({"age": skewed}, {"age": fair}, attributes={"age": ATTRIBUTES["age"]}))
    first, second = text.splitlines()[1:3]
    assert first.startswith("Before, 100.0% of 40 pictures show senior") and "poor explanation" in first
    assert second.startswith("After, ") and "cannot be told from the target (p = 1.000): with 40 pictures" in second
    assert f"It takes {pictures_for_fd(0.05, np.array([0.5, 0.25, 0.25]))} pictures" in text
    assert "knows no other attribute" in text
