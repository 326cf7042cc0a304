"""The rows of figures of a fairness report, made of its `figures.summary`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure import kinds_shown

NAMES = {
    "rmse": "pixel change (RMSE)", "ssim": "SSIM", "LPIPS": "LPIPS", "DISTS": "DISTS", "clip_i": "CLIP-I",
    "fid_clip": "FID (CLIP features)", "kid_clip": "KID (CLIP features)",
}  # fmt: skip
MEANINGS = {
    "share": "Share of the pictures in which the classifier sees the class.",
    "counted": "Fairness discrepancy (FD): the distance between the classes' shares and the target. 0 is the target "
    "mix. Counted: every picture counts for its likeliest class. The lower end of the interval is 0 where chance alone "
    "may be behind all of it.",
    "soft": "The same of the classifier's mean probabilities, as it is often published. A classifier that is never "
    "sure draws it towards 0.",
    "squared": "FD squared, less what chance adds to it. It compares sets of different size. Below 0 means none.",
    "threshold": "As many independent pictures from the target mix itself have a counted discrepancy below this 95 "
    "times in 100. A lower one cannot be told from the target.",
    "p": "How often independent pictures from the target mix itself would stray as far (chi-square test). Below 0.05, "
    "chance is a poor explanation. For pictures that were dealt out to classes it is on the careful side.",
    "kl": "How far the mix is from the target in nats; 0 is the target mix.",
    "tv": "Share of the pictures that would have to show another class to reach the target.",
    "ratio": "Largest deviation of a class from its target, by the largest that is possible: 0 to 1.",
    "worst": "The class with the lowest share by its target: 1 is as asked for, 0 is never shown.",
    "success": "Share of the pictures that show the class they were asked to.",
    "corrected": "Shares and discrepancy as they would be without the classifier's errors, which were counted on "
    "labelled pictures. The intervals hold the doubt in those counts as well.",
    "undecided": "Pictures whose likeliest class is not likely enough, and those without a face. The discrepancy is "
    "given for the best and the worst way in which they could have fallen.",
    "left out": "No face: share of the pictures in which no face was found; no other figure counts them. Other "
    "classes: how much of the pictures the classifier gives to classes that the attribute leaves out.",
    "changed class": "Share of the pictures that show another class after than before.",
    "least": "The smallest share of pictures that must change class to turn the mix before into the target.",
    "shift": "How often chance alone would shift the mix between the two sets as much. Below 0.05, chance is a poor "
    "explanation.",
    "excess": "1 if no more pictures changed class than had to, 2 if twice as many did.",
    "kept": "Share of the pictures that keep their class in another attribute. High is good: only what was asked for "
    "changed.",
    "changed": "Share of the pictures of which any pixel differs, as they are saved.",
    "rmse": "Root mean square difference of the pixels, 0 to 1.",
    "ssim": "Structural similarity of two pictures: 1 for equal ones.",
    "LPIPS": "Distance of two pictures as people see it (AlexNet): 0 for equal ones.",
    "DISTS": "Distance of two pictures in structure and texture (VGG-16): 0 for equal ones.",
    "clip_i": "Mean of (cosine + 1) / 2 of the CLIP features of each pair: 1 for equal pictures.",
    "fid_clip": "Distance between the two sets of pictures, not between pairs. These are CLIP's features, not "
    "Inception's, so compare it with no published FID. It grows with fewer pictures, and a better mix moves it too.",
    "better": "Share of the pairs in which the pictures look better to people who do not know which is which. With "
    "several judges a pair counts once, as most of them say; where they are divided there is no difference.",
    "preference": "How often as one-sided a choice would come about if people chose by tossing a coin (sign test). "
    "Below 0.05, chance is a poor explanation.",
    "... changed, to people": "Share of the pairs in which people see a difference there (of several judges, more "
    "than half).",
    "agree": "How often two judges say the same of a pair. Alpha (Krippendorff's) takes out what chance does: 1 if "
    "they always agree, 0 if as by chance.",
    "left": "How often the left picture was chosen, where one was. Sides are dealt by chance, so far from one half "
    "means that people did not look closely.",
    "looked": "How often people saw that a pair is one picture twice.",
    "kid_clip": "Like FID, but its mean does not depend on the number of pictures; about 0 for sets that differ by "
    "chance only. These are CLIP's features, too.",
}


@dataclass(frozen=True)
class Row:
    """A line of a table: a figure for every column, below each its interval ("" for none), and what it means.

    term: name of the row where the meanings are explained, if it is not the label.
    """

    label: str
    figures: tuple[str, ...]
    intervals: tuple[str, ...] = ()
    meaning: str = ""
    term: str = ""


# --- figures as text ---


def percent(share: float) -> str:
    return f"{share:.1%}"


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def span(ends: Sequence[float], form: Callable[[float], str] = decimal) -> str:
    return f"{form(ends[0])} to {form(ends[1])}"


# --- tables ---


def sides_of(numbers: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [numbers[name] for name in ("before", "after") if numbers[name]]


def columns_of(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of the tables on sets of pictures."""
    return ("target", "before", "after")[: 1 + len(sides_of(numbers))]


def fairness_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """The figures of each set: columns as `columns_of`."""
    sides = sides_of(numbers)

    def row(label: str, key: str, form: Callable[[float], str] = decimal, meaning: str = "", target: str = "") -> Row:
        intervals = tuple(span(side[f"{key}_ci"], form) if side.get(f"{key}_ci") else "" for side in sides)
        figures = tuple(form(side[key]) if side[key] is not None else "-" for side in sides)
        return Row(label, (target, *figures), ("", *intervals), MEANINGS[meaning])

    rows = [Row("pictures", ("", *(str(side["n"]) for side in sides)))]
    rows += share_rows(numbers["classes"], numbers["target"], sides, "share")
    rows += [
        row("discrepancy, counted", "fd_hard", meaning="counted", target="0"),
        row("discrepancy, soft", "fd", meaning="soft", target="0"),
        row("FD squared less chance", "fd_squared", meaning="squared", target="0"),
        row("chance stays below", "threshold", meaning="threshold"),
        row("p of the target mix", "p_value", probability, "p"),
        row("KL divergence", "kl", lambda kl: f"{kl:.3f}", "kl", "0"),
        row("total variation", "total_variation", meaning="tv", target="0"),
        row("deviation ratio", "deviation_ratio", meaning="ratio", target="0"),
    ]
    worst = tuple(f"{side['worst_off_ratio']:.2f}" for side in sides)
    names = tuple(side["worst_off"] for side in sides)
    rows.append(Row("worst-off class", ("1", *worst), ("", *names), MEANINGS["worst"]))
    if sides[-1]["success"] is not None:
        rows.append(row("show the class asked for", "success", percent, "success"))
    return rows + corrected_rows(numbers, sides) + undecided_rows(sides) + left_out_rows(sides)


def share_rows(names: Sequence[str], target: Sequence[float], sides: Sequence[Mapping], meaning: str) -> list[Row]:
    """A row for every class or cell: shares with intervals."""
    return [
        Row(
            name,
            (percent(target[i]), *(percent(side["shares"][i]) for side in sides)),
            ("", *(span(side["shares_ci"][i], percent) for side in sides)),
            MEANINGS[meaning],
            "share of a class",
        )
        for i, name in enumerate(names)
    ]


def corrected_rows(numbers: Mapping[str, Any], sides: Sequence[Mapping[str, Any]]) -> list[Row]:
    found = [side["corrected"] for side in sides]
    if None in found:
        return []
    names = [f"{name}, corrected" for name in numbers["classes"]]
    shares = share_rows(names, numbers["target"], found, "corrected")
    rows = [Row(row.label, row.figures, row.intervals, row.meaning, "corrected") for row in shares]
    figures, intervals = (decimal(side["fd"]) for side in found), (span(side["fd_ci"]) for side in found)
    return [
        *rows,
        Row("discrepancy, corrected", ("0", *figures), ("", *intervals), MEANINGS["corrected"], "corrected"),
    ]


def undecided_rows(sides: Sequence[Mapping[str, Any]]) -> list[Row]:
    found = [side["undecided"] for side in sides]
    if None in found:
        return []
    shares = tuple(percent(side["undecided"] / side["n"]) for side in found)
    counts = tuple(f"{side['undecided']} of {side['n']}" for side in found)
    ends = tuple(span((side["fd_low"], side["fd_high"])) for side in found)
    return [
        Row("undecided", ("", *shares), ("", *counts), MEANINGS["undecided"]),
        Row("discrepancy, with them", ("", *ends), (), MEANINGS["undecided"], "undecided"),
    ]


def left_out_rows(sides: Sequence[Mapping[str, Any]]) -> list[Row]:
    return [
        Row(f"left out, {reason}", ("", *(percent(side["left_out"][reason]) for side in sides)), (),
            MEANINGS["left out"], "left out")
        for reason in sides[0]["left_out"]
    ]  # fmt: skip


def paired_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """What became of the class of each picture; one column."""
    paired = numbers["paired"]
    if paired is None:
        return []
    ratio = "-" if paired["ratio"] is None else f"{paired['ratio']:.2f}"
    return [
        Row("pictures of one seed", (str(paired["n"]),)),
        Row("changed class", (percent(paired["changed"]),), (span(paired["changed_ci"], percent),),
            MEANINGS["changed class"]),
        Row("least that must change", (percent(paired["needed"]),), (), MEANINGS["least"]),
        Row("changed by least", (ratio,), (), MEANINGS["excess"]),
        Row("p of no shift", (probability(paired["p_value"]),), (paired["method"],), MEANINGS["shift"]),
    ]  # fmt: skip


def change_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """What else changed between pictures of one seed; one column."""
    rows = [
        Row(f"keep their {name}", (percent(share),), (span(numbers["kept_ci"][name], percent),), MEANINGS["kept"],
            "keep their class")
        for name, share in (numbers["kept"] or {}).items()
    ]  # fmt: skip
    changes = numbers.get("changes") or {}
    if changes:
        ends = (span(changes["changed_ci"], percent),)
        rows.append(Row("changed at all", (percent(changes["changed"]),), ends, MEANINGS["changed"]))
    return rows + [
        Row(name, (f"{changes[key]:.4g}" if key.endswith("_clip") else decimal(changes[key]),), (), MEANINGS[key])
        for key, name in NAMES.items()
        if key in changes
    ]


def judged_rows(numbers: Mapping[str, Any]) -> list[Row]:
    """What people say of pairs; one column. None if nobody said anything."""
    judged = numbers["judged"]
    if not judged or not judged["judged"]:
        return []
    together, (first, second) = judged["together"], judged["names"]
    choices = {"first": f"{first} better", "neither": "no difference", "second": f"{second} better"}
    rows = [Row("pairs judged", (f"{judged['judged']} of {judged['pairs']}",))]
    rows += [answer_row(label, together, "better", side, "better") for side, label in choices.items()]
    rows.append(Row("p of no preference", (probability(together["p_value"]),), (), MEANINGS["preference"]))
    for kind, name in kinds_shown(judged["attribute"]).items():
        rows.append(answer_row(f"{name} changed", together, "changed", kind, "... changed, to people"))
    if len(judged["by_judge"]) > 1:
        for judge, own in judged["by_judge"].items():
            rows += [answer_row(f"{choices[s]}: {judge}", own, "better", s, "better") for s in ("first", "second")]
    if judged["agreement"] is not None:
        alpha = "" if judged["alpha"] is None else f"alpha {judged['alpha']:.2f}"
        rows.append(Row("judges agree", (percent(judged["agreement"]),), (alpha,), MEANINGS["agree"]))
    for key, label in (("left", "chose the left one"), ("looked", "equal pictures noticed")):
        if found := judged[key]:
            rows.append(Row(label, (percent(found["share"]),), (span(found["share_ci"], percent),), MEANINGS[key]))
    return rows


def answer_row(label: str, answers: Mapping[str, Any], key: str, answer: str, term: str) -> Row:
    """The share of an answer; the term is explained once."""
    ends = span(answers[f"{key}_ci"][answer], percent)
    return Row(label, (percent(answers[key][answer]),), (ends,), MEANINGS[term], term)


def joint_tables(numbers: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[Row]]]:
    """Title, columns and rows of the joint table; none if none was asked for."""
    found = [side["joint"] for side in sides_of(numbers)]
    if None in found:
        return []
    rows = share_rows(found[0]["cells"], found[0]["target"], found, "share")
    figures = tuple(decimal(side["fd_hard"]) for side in found)
    ends = tuple(span(side["fd_hard_ci"]) for side in found)
    rows.append(Row("discrepancy, counted", ("0", *figures), ("", *ends)))
    rows.append(Row("chance stays below", ("", *(decimal(side["threshold"]) for side in found))))
    rows.append(Row("p of the target mix", ("", *(probability(side["p_value"]) for side in found))))
    return [("Together: " + " and ".join(found[0]["attributes"]), ("", *columns_of(numbers)), rows)]
