"""The fairness report: its figures are those of the measures, and text and page show exactly these."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up import ATTRIBUTES, EVERYTHING, full, judged, numbers_of, pictures, readings
from PIL import Image

from difflens_core.report import SHOWN, Question, report_page, report_text, share_chart, summary
from difflens_core.report.rows import MEANINGS, NAMES
from difflens_core.report.text import LIMITS, in_short

VOID = {"meta", "img", "br"}


@pytest.mark.parametrize(("n", "target"), [(1, [0.5, 0.25, 0.25]), (2, [0, 1, 0]), (5, [0.5, 0.5, 0])])
def test_few_pictures_and_targets_without_a_class_are_reported(n, target):
    read = [{name: rows[:n] for name, rows in readings(seed).items()} for seed in (1, 2)]
    ask = Question("age", ATTRIBUTES, np.array(target, dtype=float), EVERYTHING["confusion"], 0.5, ("tone",))
    more = {"size": (8, 8), "notes": "", "changes": None, "not_measured": []}
    for numbers in (summary(ask, *read, np.zeros(n, int)) | more, summary(ask, read[0]) | more):
        shown = json.loads(json.dumps(numbers, allow_nan=False))
        after = pictures(2)[:n] if numbers["after"] else None
        page = Page(report_page(shown, share_chart(shown), pictures(1)[:n], after))
        assert page.row("pictures")[1] == str(n) and "nan" not in report_text(shown)


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.unfolded: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "small":
            self.rows[-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "details" not in self.open:
            self.unfolded.append(data)
        if self.rows and self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        (found,) = [row[1:] for row in self.rows if row[0] == label]
        return found


def page_of(numbers: dict, after: bool = True) -> str:
    return report_page(numbers, share_chart(numbers), pictures(1), pictures(2) if after else None, "2030-01-02")


def test_page_is_whole_and_needs_nothing_beside_itself():
    text = page_of(full())
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</html>\n")
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 1 + 2 * SHOWN and all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a", "object", "base", "form"}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("href", "srcset", "style")]
    assert not re.search(r"https?:|url\(|@import", text)


def test_what_anybody_reads_comes_first_and_the_statistics_are_folded():
    numbers = full()
    text = page_of(numbers)
    open_words = " ".join(Page(text).unfolded)
    assert in_short(numbers) in open_words and "KID needs 100 pictures" in open_words and LIMITS[0] in open_words
    assert "discrepancy" not in open_words and "<details>" in text and text.index("<img") < text.index("<details>")


def test_pictures_on_the_page_are_the_first_ones_with_their_classes():
    numbers = full()
    sources = [attrs for tag, attrs in Page(page_of(numbers)).tags if tag == "img"][1:]
    assert len(sources) == 2 * SHOWN
    for i, attrs in enumerate(sources):
        number, side, seed = i // 2, ("before", "after")[i % 2], 1 + i % 2
        shown = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert (np.asarray(shown) == pictures(seed)[number]).all()
        assert attrs["alt"] == f"{side}: {numbers[side]['labels'][number] or 'no face'}"


def test_every_figure_on_the_page_is_the_summarys():
    numbers = json.loads(json.dumps(full()))
    page = Page(page_of(numbers))
    sides = [numbers["before"], numbers["after"]]

    def interval(ends: list[float], form: str) -> str:
        return f" | {ends[0]:{form}} to {ends[1]:{form}}"

    for i, name in enumerate(numbers["classes"]):
        for label, read in ((name, sides), (f"{name}, corrected", [side["corrected"] for side in sides])):
            expected = [f"{r['shares'][i]:.1%}{interval(r['shares_ci'][i], '.1%')}" for r in read]
            assert page.row(label) == [f"{numbers['target'][i]:.1%}", *expected]
        counts = numbers["paired"]["table"][i]
        assert page.row(f"{name} before") == [str(count) for count in counts]
    soft = [f"{side['fd']:.3f}{interval(side['fd_ci'], '.3f')}" for side in sides]
    assert page.row("discrepancy, soft") == ["0", *soft]
    assert page.row("discrepancy, corrected")[1].startswith(f"{sides[0]['corrected']['fd']:.3f} | ")
    for label, key in (
        ("FD squared less chance", "fd_squared"), ("KL divergence", "kl"), ("total variation", "total_variation"),
        ("deviation ratio", "deviation_ratio"),
    ):  # fmt: skip
        assert page.row(label)[1:] == [f"{side[key]:.3f}" for side in sides], label
    assert page.row("worst-off class")[1:] == [f"{s['worst_off_ratio']:.2f} | {s['worst_off']}" for s in sides]
    asked = f"{sides[1]['success']:.1%}{interval(sides[1]['success_ci'], '.1%')}"
    assert page.row("show the class asked for") == ["", "-", asked]
    bounds = [side["undecided"] for side in sides]
    assert page.row("discrepancy, with them")[1:] == [f"{b['fd_low']:.3f} to {b['fd_high']:.3f}" for b in bounds]
    assert page.row("undecided")[1:] == [f"{b['undecided'] / 40:.1%} | {b['undecided']} of 40" for b in bounds]
    for i, cell in enumerate(sides[0]["joint"]["cells"]):
        expected = [f"{s['joint']['shares'][i]:.1%}{interval(s['joint']['shares_ci'][i], '.1%')}" for s in sides]
        assert page.row(cell)[1:] == expected
    for name, share in numbers["kept"].items():
        assert page.row(f"keep their {name}") == [f"{share:.1%}{interval(numbers['kept_ci'][name], '.1%')}"]
    for key, label in NAMES.items():
        (figure,) = page.row(label)
        assert float(figure) == pytest.approx(numbers["changes"][key], abs=5e-4)
    answers = numbers["judged"]["together"]
    for label, key, answer in (("after better", "better", "second"), ("hair changed", "changed", "hair")):
        share, ends = answers[key][answer], answers[f"{key}_ci"][answer]
        assert page.row(label) == [f"{share:.1%}{interval(ends, '.1%')}"]
    words = "".join(page.words)
    for text in ("CFG 7.5, seed 3", "KID needs 100 pictures", "64 x 48 pixels", "2030-01-02", MEANINGS["success"]):
        assert text in words
    assert "50 labelled adult" not in words and "57 labelled adult" in words


def test_hostile_names_and_notes_are_only_text():
    evil = '<script>alert("x")</script>&amp;</style>'
    attributes = {"age": (evil, "adult", "senior"), "tone": (evil, "dark"), evil: ("no", "yes")}
    read = [{**readings(seed), evil: readings(seed)["glasses"]} for seed in (1, 2)]
    numbers = numbers_of(*read, attributes=attributes, joint_with=("tone", evil))
    numbers |= {"notes": evil, "not_measured": [evil], "attribute": evil, "judged": judged((evil, "b"), evil, evil)}
    text = page_of(numbers)
    page = Page(text)
    assert evil not in text and html.escape(evil) in text
    assert not {tag for tag, _ in page.tags} & {"script"} and text.count("</style>") == 1
    assert page.row(evil)[0] == "50.0%" and page.row(f"{evil} changed") and evil in "".join(page.words)


def test_a_page_on_one_set_of_pictures_speaks_of_no_other():
    page = Page(page_of(numbers_of(readings(1)), after=False))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1 + SHOWN
    assert page.row("pictures") == ["", "40"]
    assert "What else changed" not in page.words and "after" not in [cell for row in page.rows for cell in row]
    missing = numbers_of(readings(1)) | {"notes": ""}
    assert "CFG scale, seed and sampler were not stated." in page_of(missing, after=False)
