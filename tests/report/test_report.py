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
import torch
from PIL import Image

from difflens_core.classifiers.readings import NO_FACE
from difflens_core.files import DiffLensError
from difflens_core.measure import correct_for_errors, joint_report, measure_fairness, paired_test, pictures_for_fd
from difflens_core.report import SHOWN, Question, report_page, report_text, share_chart, summary
from difflens_core.report.figures import side_figures
from difflens_core.report.rows import MEANINGS, NAMES, fairness_rows

ATTRIBUTES = {"age": ("young", "adult", "senior"), "tone": ("light", "dark"), "glasses": ("no", "yes")}
N = 40
VOID = {"meta", "img", "br"}


def readings(seed: int, faces: bool = False) -> dict[str, torch.Tensor]:
    """Random probabilities of every attribute; every tenth picture without a face, if there are `faces`."""
    rng = np.random.default_rng(seed)
    read = {
        name: torch.tensor(rng.dirichlet(np.full(len(classes), 0.4), N)).float() for name, classes in ATTRIBUTES.items()
    }
    if faces:
        read[NO_FACE] = (torch.arange(N) % 10 == 3).float()
    return read


def question(**settings: object) -> Question:
    return Question("age", settings.pop("attributes", ATTRIBUTES), np.array([0.5, 0.25, 0.25]), **settings)


EVERYTHING = {
    "confusion": np.array([[40, 5, 0], [3, 50, 4], [0, 6, 60]]), "undecided_below": 0.6,
    "joint_with": ("tone", "glasses"),
}  # fmt: skip


def numbers_of(before: dict, after: dict | None = None, assigned: np.ndarray | None = None, **settings: object) -> dict:
    """A summary with what the node adds."""
    found = summary(question(**settings), before, after, assigned)
    changes = dict(zip(NAMES, np.linspace(0.0123, 0.987, len(NAMES)).tolist(), strict=True))
    changes |= {"changed": 0.975, "changed_ci": (0.871, 0.996)}
    more = {"size": (64, 48), "notes": "CFG 7.5, seed 3", "changes": changes if after else None}
    return found | more | {"not_measured": ["KID needs 100 pictures or more; there are 40."]}


def full() -> dict:
    after = readings(2) | {NO_FACE: torch.zeros(N)}
    return numbers_of(readings(1, faces=True), after, np.arange(N) % 3, **EVERYTHING)


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (N, 48, 64, 3), dtype=np.uint8)


# --- figures ---


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


def test_pictures_without_any_face_are_refused():
    nobody = {**readings(1), NO_FACE: torch.ones(N)}
    with pytest.raises(DiffLensError, match="no face was found in any of the 40 pictures"):
        side_figures(question(), nobody)
    nobody[NO_FACE][0] = 0
    others = {**readings(2), NO_FACE: 1 - nobody[NO_FACE]}
    found = numbers_of(nobody, others)
    assert found["paired"] is None and "pairs could not be compared" in report_text(found)


# --- text ---


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


# --- page ---


class Page(HTMLParser):
    """What a page holds; fails on tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
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
    words = "".join(page.words)
    for text in ("CFG 7.5, seed 3", "KID needs 100 pictures", "64 x 48 pixels", "2030-01-02", MEANINGS["success"]):
        assert text in words
    assert "50 labelled adult" not in words and "57 labelled adult" in words


def test_hostile_names_and_notes_are_only_text():
    evil = '<script>alert("x")</script>&amp;</style>'
    attributes = {"age": (evil, "adult", "senior"), "tone": (evil, "dark"), evil: ("no", "yes")}
    read = [{**readings(seed), evil: readings(seed)["glasses"]} for seed in (1, 2)]
    numbers = numbers_of(*read, attributes=attributes, joint_with=("tone", evil))
    numbers |= {"notes": evil, "not_measured": [evil], "attribute": evil}
    text = page_of(numbers)
    page = Page(text)
    assert evil not in text and html.escape(evil) in text
    assert not {tag for tag, _ in page.tags} & {"script"} and text.count("</style>") == 1
    assert page.row(evil)[0] == "50.0%" and evil in "".join(page.words)


def test_a_page_on_one_set_of_pictures_speaks_of_no_other():
    page = Page(page_of(numbers_of(readings(1)), after=False))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1 + SHOWN
    assert page.row("pictures") == ["", "40"]
    assert "What else changed" not in page.words and "after" not in [cell for row in page.rows for cell in row]
    missing = numbers_of(readings(1)) | {"notes": ""}
    assert "CFG scale, seed and sampler were not stated." in page_of(missing, after=False)


# --- chart ---


def test_the_chart_has_whiskers_and_the_target():
    numbers = full()
    plain = json.loads(json.dumps(numbers))
    for side in ("before", "after"):
        plain[side]["shares_ci"] = [(share, share) for share in plain[side]["shares"]]
    chart = share_chart(numbers)
    assert chart.shape == (440, 720, 3) and (chart != share_chart(plain)).any()
    moved = json.loads(json.dumps(numbers)) | {"target": [0.2, 0.4, 0.4]}
    assert (chart != share_chart(moved)).any()
