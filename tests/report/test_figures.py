"""The figures of a report are those of the measures; their chart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from made_up import ATTRIBUTES, EVERYTHING, N, full, numbers_of, question, readings

from difflens_core.classifiers.readings import NO_FACE
from difflens_core.files import DiffLensError
from difflens_core.measure import correct_for_errors, joint_report, measure_fairness, paired_test
from difflens_core.report import report_text, share_chart, summary
from difflens_core.report.charts import PALETTE
from difflens_core.report.figures import side_figures


def test_figures_of_a_side_are_those_of_the_measures():
    read, assigned = readings(1, faces=True), np.arange(N) % 3
    found = side_figures(question(**EVERYTHING), read, assigned)
    seen = (torch.arange(N) % 10 != 3).numpy()
    p = {name: read[name].numpy()[seen] for name in ATTRIBUTES}
    target = np.array([0.5, 0.25, 0.25])
    report = measure_fairness(p["age"], target, "age", ATTRIBUTES["age"], assigned[seen])
    assert found["n"] == 36 and found["shares"] == report.shares and found["fd_ci"] == report.fd_ci
    assert found["success"] == report.success and found["p_value"] == report.p_value
    assert found["left_out"] == {"no face": pytest.approx(0.1)} and found["labels"][3] is None
    corrected = correct_for_errors(
        p["age"].argmax(1), target, EVERYTHING["confusion"], ATTRIBUTES["age"], assigned[seen]
    )
    assert found["corrected"]["shares"] == corrected.shares and found["corrected"]["fd_ci"] == corrected.fd_ci

    unclear = ((read["age"].amax(dim=1) < 0.6) | (read[NO_FACE] > 0.5)).sum()
    assert found["undecided"]["undecided"] == unclear and found["undecided"]["n"] == N
    joint = joint_report(p, ATTRIBUTES, {"age": target, "tone": np.full(2, 0.5), "glasses": np.full(2, 0.5)})
    assert found["joint"]["counts"] == joint.counts.ravel().tolist() and sum(found["joint"]["counts"]) == 36
    assert found["joint"]["cells"][:2] == ("young, light, no", "young, light, yes")
    assert found["joint"]["fd_hard"] == joint.report.fd_hard


def test_a_pair_counts_pictures_with_a_face_in_both():
    before, after = readings(1, faces=True), readings(2)
    found = summary(question(), before, after)
    seen = torch.arange(N) % 10 != 3
    a, b = (read["age"][seen].argmax(1).numpy() for read in (before, after))
    expected = paired_test(a, b, np.array([0.5, 0.25, 0.25]))
    assert found["paired"]["table"] == expected.table and found["paired"]["n"] == 36
    assert found["kept"].keys() == {"tone", "glasses"}
    low, high = found["kept_ci"]["tone"]
    assert low < found["kept"]["tone"] < high


def test_a_report_on_one_set_has_nothing_to_compare():
    found = summary(question(), readings(1))
    assert [found[name] for name in ("after", "paired", "kept")] == [None] * 3
    assert [found["before"][name] for name in ("corrected", "undecided", "joint", "success")] == [None] * 4


def test_pictures_without_any_face_are_refused():
    nobody = {**readings(1), NO_FACE: torch.ones(N)}
    with pytest.raises(DiffLensError, match="no face was found in any of the 40 pictures"):
        side_figures(question(), nobody)
    nobody[NO_FACE][0] = 0
    others = {**readings(2), NO_FACE: 1 - nobody[NO_FACE]}
    found = numbers_of(nobody, others)
    assert found["paired"] is None and "pairs could not be compared" in report_text(found)


def test_the_chart_has_whiskers_and_the_target():
    numbers = full()
    plain = json.loads(json.dumps(numbers))
    for side in ("before", "after"):
        plain[side]["shares_ci"] = [(share, share) for share in plain[side]["shares"]]
    chart = share_chart(numbers)
    assert chart.shape == (440, 720, 3) and (chart != share_chart(plain)).any()
    moved = json.loads(json.dumps(numbers)) | {"target": [0.2, 0.4, 0.4]}
    assert (chart != share_chart(moved)).any()


@pytest.mark.parametrize("target", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.4, 0.4]])
def test_before_and_after_have_their_colours_whatever_the_target(target):
    for side, colour in (("before", PALETTE[0]), ("after", PALETTE[1])):
        numbers = json.loads(json.dumps(full())) | {"target": target}
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        seen = (share_chart(numbers) == wanted).all(axis=-1).sum()
        numbers[side]["shares"] = [0.0, 0.0, 0.0]
        assert (share_chart(numbers) == wanted).all(axis=-1).sum() < seen / 2
