"""The report in words."""

from __future__ import annotations

import numpy as np
import torch
from made_up import ATTRIBUTES, full, judged, numbers_of

from difflens_core.measure import OPEN, pictures_for_fd
from difflens_core.report import Question, judged_text, report_text, summary
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
    short, _, first, second = text.splitlines()[:4]
    assert short == "Before: 0 young, 0 adult, 40 senior. Now: 20 young, 10 adult, 10 senior."
    assert first.startswith("Before, 100.0% of 40 pictures show senior") and "poor explanation" in first
    assert second.startswith("After, ") and "not excluded (p = 1.000), but 40 pictures are too few to tell" in second
    assert f"It takes {pictures_for_fd(0.05, np.array([0.5, 0.25, 0.25]))} pictures" in text
    assert "knows no other attribute" in text


def test_the_target_is_reached_only_where_the_interval_is_narrow_enough():
    attributes, many = {"age": ATTRIBUTES["age"]}, torch.eye(3)[[0, 0, 1, 2] * 1000]
    text = report_text(numbers_of({"age": many}, attributes=attributes))
    assert "The target is reached: the counted discrepancy is at most 0.0" in text
    asked = np.array([0, 0, 1, 2] * 50)
    dealt = {"age": torch.eye(3)[np.where(np.arange(200) % 20 == 0, 2, asked)]}
    after = report_text(numbers_of(dealt, dealt, asked, attributes=attributes)).splitlines()[3]
    assert after.startswith("After, ") and "The target is missed: the counted discrepancy is at least 0.0" in after


def test_of_a_single_class_no_number_of_pictures_is_told():
    question = Question("age", {"age": ATTRIBUTES["age"]}, np.array([0.0, 1.0, 0.0]))
    found = summary(question, {"age": torch.eye(3)[[1] * 8]})
    assert found["resolution"]["pictures"] is None and found["before"]["outcome"] == OPEN


def test_it_begins_with_what_an_artist_wants_to_know():
    before, after = torch.eye(3)[[2] * 8], torch.eye(3)[[0, 1] * 4]
    tones, glasses = torch.eye(2)[[0] * 8], torch.eye(2)[[1] * 7 + [0]]
    first = {"age": before, "tone": tones, "glasses": torch.eye(2)[[1] * 8]}
    found = numbers_of(first, {"age": after, "tone": tones, "glasses": glasses})
    told = "Before: 0 young, 0 adult, 8 senior. Now: 4 young, 4 adult, 0 senior. Everything else stayed in "
    assert report_text(found).splitlines()[0] == told + "7 of 8 pictures or more (glasses changed most)."
    lost = numbers_of(first, {"age": after, "tone": tones, "glasses": torch.eye(2)[[0] * 8]})
    gone = "Glasses changed in all 8 pictures. Everything else stayed in "
    assert report_text(lost).splitlines()[0] == told.replace("Everything else stayed in ", gone) + "all 8 pictures."
    same = numbers_of(first, {"age": after, "tone": tones, "glasses": first["glasses"]})
    assert report_text(same).splitlines()[0] == told + "all 8 pictures."


def test_where_the_target_is_met_the_class_that_was_asked_for_is_named():
    alone = Question("age", {"age": ATTRIBUTES["age"]}, np.array([0.0, 0.0, 1.0]))
    found = summary(alone, {"age": torch.eye(3)[[2] * 8]}) | {"size": (64, 64), "notes": "", "not_measured": []}
    assert "100.0% of 8 pictures show senior" in report_text(found) and "1 pictures" not in report_text(found)


def test_what_people_say_is_told_in_a_sentence_and_a_table():
    found = full()
    text = report_text(found)
    told = (
        "To 2 people who did not know which is which, before looks better in 0 of 5 pairs, after in 2, and 3 show no "
        "difference (p of no preference = 0.500)."
    )
    assert told in text and "Pairs for Judge by Eye that nobody judged yet: 1 of 6." in text
    table = text.split("\nJudged by people\n")[1].split("\n\n")[0].splitlines()
    assert judged_text(found["judged"]).splitlines() == [told, "", *table]
    shown = {line[:26].strip(): line[26:].strip() for line in table if line[:26].strip()}
    assert shown.pop("pairs judged") == "5 of 6" and shown.pop("p of no preference") == "0.500"
    assert shown == {
        "before better": "0.0%", "no difference": "60.0%", "after better": "40.0%", "age changed": "40.0%",
        "hair changed": "80.0%", "nothing changed": "20.0%", "face or person changed": "0.0%",
        "clothes changed": "0.0%", "background changed": "0.0%", "quality changed": "0.0%", "judges agree": "40.0%",
        "before better: anna": "20.0%", "after better: anna": "60.0%", "before better: ben": "40.0%",
        "after better: ben": "60.0%", "chose the left one": "33.3%", "equal pictures noticed": "75.0%",
    }  # fmt: skip
    assert judged_text(judged(attribute="")).count("age changed") == 0
    assert judged_text({**found["judged"], "judged": 0}) == "Nobody judged a pair yet."
