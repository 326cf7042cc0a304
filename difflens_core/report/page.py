"""The fairness report as one HTML page that needs nothing beside itself: for a reader, a printer, an archive."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from .rows import Row, change_rows, columns_of, fairness_rows, joint_tables, judged_rows, paired_rows
from .text import JUDGED, LIMITS, findings, in_short, left_open, settings

SHOWN = 8  # pairs of pictures on the page
SMALL_PRINT = "In small print: 95 % intervals, which hold the true value 95 times in 100."
LARGEST = 192  # pixels of the longer side of a picture on the page

STYLE = """
body { font: 15px/1.5 Georgia, "Times New Roman", serif; color: #1a1a1a; background: #fff; max-width: 860px;
  margin: 0 auto; padding: 36px 24px 60px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 34px 0 8px; }
p { margin: 8px 0; }
table { border-collapse: collapse; width: 100%; border-top: 2px solid #1a1a1a; border-bottom: 2px solid #1a1a1a;
  margin: 10px 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 6px 0; color: #444; }
thead th { border-bottom: 1px solid #1a1a1a; }
th, td { padding: 4px 10px 4px 0; text-align: right; vertical-align: top; font-weight: normal; }
th:first-child { text-align: left; }
tbody tr + tr > * { border-top: 1px solid #e6e6e6; }
td small { display: block; color: #666; font-size: 12px; }
.narrow { width: auto; min-width: 400px; }
.settings th { width: 30%; color: #444; } .settings td { text-align: left; white-space: pre-line; }
figure { margin: 14px 0; } figcaption { color: #444; font-size: 13px; margin-top: 6px; }
.chart { width: 100%; max-width: 720px; height: auto; }
.pairs { display: flex; flex-wrap: wrap; gap: 10px; }
.pair { width: 96px; font-size: 12px; line-height: 1.3; } .pair img { width: 96px; height: auto; display: block;
  margin-bottom: 3px; }
summary { font-size: 19px; margin: 34px 0 8px; cursor: pointer; }
dt { font-weight: bold; margin-top: 8px; } dd { margin: 0; }
footer { margin-top: 36px; border-top: 1px solid #ccc; padding-top: 8px; color: #666; font-size: 12px; }
@page { margin: 16mm; }
@media print { body { padding: 0; max-width: none; } h2 { break-after: avoid; } tr, figure, .pair, dl div {
  break-inside: avoid; } details::details-content { content-visibility: visible; } }
"""


def report_page(
    numbers: Mapping[str, Any], chart: np.ndarray, before: np.ndarray, after: np.ndarray | None = None, day: str = ""
) -> str:
    """HTML of a `report.summary`, with no script and no link to anything outside. All text is escaped.

    First what anybody reads: a sentence, the chart, the pictures. The statistics are folded, and open in print.

    numbers: with size (width, height), notes, changes (what `changes` measures, or None) and not_measured (sentences)
    beside the summary's; chart: H x W x 3, uint8; before, after: pictures n x H x W x 3, uint8, paired by seed, of
    which the first `SHOWN` are shown; day: when it was written.
    """
    rows, changes, paired = fairness_rows(numbers), change_rows(numbers), paired_rows(numbers)
    chart_shown = picture(chart, "chart", "Share of each class", "Whiskers: 95 % intervals.")
    parts = [
        section("In short", paragraphs([in_short(numbers)]) + chart_shown),
        section("The first pictures", pairs(numbers, before, after)),
        "<details>\n<summary>Statistics</summary>\n",
        section("What was measured", settings_table(settings(numbers))),
        section("Fairness", paragraphs(findings(numbers)) + table(["", *columns_of(numbers)], rows, SMALL_PRINT)),
    ]
    if paired:
        parts.append(
            section("Before and after, picture by picture", table(["", "value"], paired) + transitions(numbers))
        )
    for title, heads, body in joint_tables(numbers):
        parts.append(section(title, table(heads, body)))
    if changes:
        parts.append(section("What else changed", table(["", "value"], changes)))
    if judged := judged_rows(numbers):
        parts.append(section(JUDGED, table(["", "value"], judged)))
    parts.append(section("What the numbers mean", meanings([*rows, *paired, *changes, *judged])))
    parts.append("</details>\n")
    if notes := left_open(numbers):
        parts.append(section("Not measured", paragraphs(notes)))
    parts.append(section("Limits", paragraphs(LIMITS)))
    title = f"Fairness report: {numbers['attribute']}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n{''.join(parts)}"
        f"<footer>Made with DiffLens for ComfyUI. {escape(day)}</footer>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def transitions(numbers: Mapping[str, Any]) -> str:
    """How many pictures went from which class to which."""
    classes = numbers["classes"]
    rows = [
        Row(f"{name} before", tuple(map(str, counts)))
        for name, counts in zip(classes, numbers["paired"]["table"], strict=True)
    ]
    return table(["number of pictures", *(f"{name} after" for name in classes)], rows)


def settings_table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<table class="settings"><tbody>\n{body}</tbody></table>'


def table(heads: Sequence[str], rows: Sequence[Row], caption: str = "") -> str:
    """A table of rows; an interval stands below its figure. One of single values is narrow."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr><th>{escape(row.label)}</th>{cells(row)}</tr>\n" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = ' class="narrow"' if heads[-1] == "value" else ""
    return f"<table{kind}>{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def cells(row: Row) -> str:
    intervals = row.intervals or [""] * len(row.figures)
    return "".join(
        f"<td>{escape(figure)}{f'<small>{escape(interval)}</small>' if interval else ''}</td>"
        for figure, interval in zip(row.figures, intervals, strict=True)
    )


def meanings(rows: Sequence[Row]) -> str:
    """Every term of the tables that is explained, once."""
    found = {row.term or row.label: row.meaning for row in rows if row.meaning}
    body = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>\n" for term, text in found.items())
    return f"<dl>\n{body}</dl>"


def pairs(numbers: Mapping[str, Any], before: np.ndarray, after: np.ndarray | None) -> str:
    """The first pictures, each above its steered one, with the class that the classifier sees."""
    body = ""
    for i in range(min(SHOWN, len(before))):
        body += f'<div class="pair">{shown(before[i], numbers["before"]["labels"][i], "before")}'
        if after is not None:
            body += shown(after[i], numbers["after"]["labels"][i], "after")
        body += "</div>\n"
    order = "Above before, below after, from the same seed. " if after is not None else ""
    note = f"{order}They are the first of the run, not chosen. Below each: the class that the classifier sees."
    return f'<figure><div class="pairs">\n{body}</div><figcaption>{escape(note)}</figcaption></figure>'


def shown(image: np.ndarray, label: str | None, side: str) -> str:
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    label = label or "no face"
    return f'<img src="{data_uri(small)}" alt="{escape(f"{side}: {label}")}">{escape(label)}<br>'


def picture(image: np.ndarray, kind: str, text: str, caption: str) -> str:
    source = data_uri(Image.fromarray(np.ascontiguousarray(image)))
    return (
        f'<figure><img class="{kind}" src="{source}" alt="{escape(text)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(image: Image.Image) -> str:
    """A picture as PNG in the address itself."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
