"""What people say of pairs of pictures that they are shown blind, and the CSV file that keeps it."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..files import DiffLensError, digest, write_whole

FIRST, SECOND, NEITHER = "first", "second", "neither"
NOTHING = "nothing"
# What may differ between two pictures, and what people are shown for it; for the attribute, its own name.
KINDS = {
    NOTHING: "nothing", "attribute": "", "person": "face or person", "hair": "hair", "clothes": "clothes",
    "background": "background", "quality": "quality",
}  # fmt: skip
OF_CHANGE = tuple(KINDS)[1:]
YES_NO = {True: "yes", False: "no"}
LONGEST_NAME = 40
LARGEST_FILE = 16 * 2**20  # bytes: some 150 000 judgements
FORMULA = "=+-@"  # a cell that begins with one of these is computed by a spreadsheet


@dataclass(frozen=True)
class Pair:
    """Two pictures to be compared. number: from 1; mark: tells its pictures from others; equal: they are the same."""

    number: int
    mark: str
    equal: bool


@dataclass(frozen=True)
class Judgement:
    """What one person said of one pair, a line of the file.

    time: when (ISO 8601); pictures: the pair's mark; first, second: what the two were called; left: which of them,
    "first" or "second", was on the left; better: "first", "second" or "neither"; changed: of `KINDS`.
    """

    time: str
    judge: str
    pictures: str
    pair: int
    equal: bool
    first: str
    second: str
    left: str
    better: str
    changed: tuple[str, ...]


HEAD = [field.name for field in fields(Judgement)]


@dataclass(frozen=True)
class Judged:
    """Pairs and what was said of them.

    names: of the first and the second pictures; attribute: what was steered, or ""; pairs: of which the last `catches`
    show one picture twice, to see who looks; judgements: the last one of each judge on each of these pairs.
    """

    names: tuple[str, str]
    attribute: str
    pairs: tuple[Pair, ...]
    catches: int = 0
    judgements: tuple[Judgement, ...] = ()


# --- what is shown ---


def with_catches(first: np.ndarray, second: np.ndarray, catches: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (n x H x W x 3, uint8, each), and behind them `catches` of the second ones, the same in both."""
    chosen = second[np.random.default_rng(seed).permutation(len(second))[:catches]]
    return np.concatenate([first, chosen]), np.concatenate([second, chosen])


def pairs_of(first: np.ndarray, second: np.ndarray) -> tuple[Pair, ...]:
    """A pair for each picture of the two (n x H x W x 3, uint8, each)."""
    found = []
    for number, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        mark = digest(str(number), str(one.shape), one.tobytes(), other.tobytes())
        # The letter, because spreadsheets take some marks for large numbers.
        found.append(Pair(number, f"p{mark}", bool((one == other).all())))
    return tuple(found)


def order_for(judge: str, count: int, seed: int) -> list[tuple[int, bool]]:
    """In which order a judge sees the pairs (0 to count - 1), and whether the first picture is on the left.

    Every judge has an order of their own, the same each time; the first picture is on the left in half of the pairs.
    """
    chance = np.random.default_rng(int(digest(str(seed), judge), 16))
    sides = chance.permutation(np.arange(count) % 2 == 0)
    return list(zip(chance.permutation(count).tolist(), sides.tolist(), strict=True))


def last_said(said: Sequence[Judgement], pairs: Sequence[Pair]) -> tuple[Judgement, ...]:
    """Of the judgements on these pairs the last one of each judge and pair: people may change their minds."""
    marks = {pair.mark for pair in pairs}
    return tuple({(one.judge, one.pictures): one for one in said if one.pictures in marks}.values())


def kinds_shown(attribute: str) -> dict[str, str]:
    """`KINDS` with the attribute's name, or without it if none is told."""
    shown = KINDS | {"attribute": attribute.replace("_", " ")}
    return {kind: name for kind, name in shown.items() if name}


def check_name(name: str, what: str) -> str:
    """The name of a judge or of pictures without blanks around it. Raises `DiffLensError` if a table would not bear it.

    A spreadsheet must not take it for a formula, and it must fit into a line.
    """
    name = unicodedata.normalize("NFC", name).strip()
    begin = unicodedata.normalize("NFKC", name)[:1]
    if not name.isprintable() or not begin or begin in FORMULA or len(name) > LONGEST_NAME:
        raise DiffLensError(
            f"{what} {name[:60]!r} cannot be used. Give 1 to {LONGEST_NAME} letters, digits or signs in one line, not "
            f"beginning with one of {' '.join(FORMULA)}."
        )
    return name


# --- the file ---


def add_judgement(path: Path, judgement: Judgement) -> None:
    """Write a judgement below those in the file, which is made if need be.

    Raises `DiffLensError` if the file holds something else, and `NotWritten`.
    """
    known = text_of(path)
    lines = io.StringIO(newline="")
    table = csv.writer(lines)
    if not known:
        table.writerow(HEAD)
    elif not known.endswith("\n"):
        lines.write("\r\n")
    values = vars(judgement) | {"equal": YES_NO[judgement.equal], "changed": " ".join(judgement.changed)}
    table.writerow([values[name] for name in HEAD])
    write_whole(path, (known + lines.getvalue()).encode())


def read_judgements(path: Path) -> list[Judgement]:
    """All judgements of a file, in its order; none if there is no such file.

    Raises `DiffLensError` that names the line which is no judgement.
    """
    lines = csv.reader(io.StringIO(text_of(path), newline=""), strict=True)
    next(lines, None)
    found = []
    try:
        for row in lines:
            found += [judgement_of(row)] if row else []
    except (csv.Error, ValueError) as error:
        raise DiffLensError(
            f"{path.name}, line {lines.line_num}: {error}. Mend the line, or give another name in save_as."
        ) from error
    return found


def text_of(path: Path) -> str:
    """The file's text, "" if there is none. Raises `DiffLensError` if it does not hold judgements."""
    if not path.is_file():
        return ""
    if path.stat().st_size > LARGEST_FILE:
        raise DiffLensError(f"{path.name} is larger than {LARGEST_FILE >> 20} MB. Give another name in save_as.")
    text = path.read_bytes().decode("utf-8-sig", errors="replace")  # spreadsheets put a mark before the first cell
    first = text.partition("\n")[0].rstrip("\r")
    if text and first != ",".join(HEAD):
        raise DiffLensError(
            f"{path.name} begins with {first[:80]!r}, expected {','.join(HEAD)!r}: it holds no judgements, or a "
            "spreadsheet saved it in another form. Save it as CSV with commas, or give another name in save_as."
        )
    if "\ufffd" in text:
        raise DiffLensError(f"{path.name} is no text in UTF-8. Save it so, or give another name in save_as.")
    return text


def judgement_of(row: list[str]) -> Judgement:
    """A line of the file. Raises ValueError that says what is wrong with it."""
    if len(row) != len(HEAD):
        raise ValueError(f"{len(row)} cells, expected {len(HEAD)}")
    cell = dict(zip(HEAD, row, strict=True))
    for name, known in (("left", (FIRST, SECOND)), ("better", (FIRST, SECOND, NEITHER)), ("equal", YES_NO.values())):
        if cell[name] not in known:
            raise ValueError(f"{name} is {cell[name][:60]!r}, expected {', '.join(known)}")
    for name in ("judge", "first", "second"):
        check_name(cell[name], name)
    return Judgement(
        cell["time"], cell["judge"], cell["pictures"], int(cell["pair"]), cell["equal"] == YES_NO[True], cell["first"],
        cell["second"], cell["left"], cell["better"], check_changed(cell["changed"].split()),
    )  # fmt: skip


def check_changed(changed: Sequence[str]) -> tuple[str, ...]:
    """Kinds of change in the order of `KINDS`. Raises ValueError if they are none or do not go together."""
    unknown = [kind for kind in changed if kind not in KINDS]
    if unknown or not changed or (NOTHING in changed and len(set(changed)) > 1):
        expected = f"{NOTHING!r}, or some of {', '.join(OF_CHANGE)}"
        raise ValueError(f"changed is {' '.join(map(str, changed))[:60]!r}, expected {expected}")
    return tuple(kind for kind in KINDS if kind in changed)
