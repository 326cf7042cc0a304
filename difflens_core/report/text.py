"""The sentences and the plain text of a fairness report, made of its `figures.summary`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure import OPEN, REACHED
from .rows import (
    Row,
    change_rows,
    columns_of,
    fairness_rows,
    joint_tables,
    judged_rows,
    paired_rows,
    percent,
    probability,
    sides_of,
    span,
)

LIMITS = (
    "An attribute here is what a classifier sees in a picture: a presentation, an apparent age, a skin tone. It is "
    "never what a person is. The classes are few and coarse.",
    "The intervals tell how far chance may have moved the figures. They know nothing of the classifier's own errors, "
    "unless the report has corrected figures, and hold for this model, prompt and these settings only.",
    "Fair shares of one attribute say nothing about others, or about how people are shown within a class.",
)


# --- sentences ---


def settings(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, and how, as name and value."""
    classes, after = numbers["classes"], numbers["after"]
    shares = ", ".join(f"{percent(share)} {name}" for name, share in zip(classes, numbers["target"], strict=True))
    pictures = f"{len(numbers['before']['labels'])} before"
    if after:
        pictures += f", {len(after['labels'])} after, from the same seeds"
    width, height = numbers["size"]
    rows = [
        ("Attribute", f"{numbers['attribute']}: {', '.join(classes)}"),
        ("Target", shares),
        ("Pictures", f"{pictures}; {width} x {height} pixels"),
    ]
    if after and after["success"] is not None:
        rows.append(("Steering", "Every picture after was asked to show one class; Steer dealt them out."))
    if numbers["before"]["corrected"]:
        labelled = zip(numbers["before"]["corrected"]["labelled"], classes, strict=True)
        rows.append(("Classifier's errors", "Counted on " + ", ".join(f"{n} labelled {name}" for n, name in labelled)))
    if joint := numbers["before"]["joint"]:
        others = " and ".join(joint["attributes"][1:])
        rows.append(("Together", f"With {others}, whose classes are all to be shown equally often"))
    if numbers["undecided_below"]:
        rows.append(("Undecided", f"Where the likeliest class has less than {percent(numbers['undecided_below'])}"))
    return [*rows, ("Notes", numbers["notes"] or "CFG scale, seed and sampler were not stated.")]


def in_short(numbers: Mapping[str, Any]) -> str:
    """How many pictures show what, before and now, and whether the rest stayed: for those who want no more."""

    def mix(side: Mapping[str, Any]) -> str:
        shares = zip(numbers["classes"], side["shares"], strict=True)
        return ", ".join(f"{round(share * side['n'])} {name}" for name, share in shares)

    told = f"Before: {mix(numbers['before'])}."
    if numbers["after"]:
        told += f" Now: {mix(numbers['after'])}."
    if numbers["kept"]:
        pairs = sum(map(sum, numbers["paired"]["table"]))
        stayed = {name.replace("_", " "): round(share * pairs) for name, share in numbers["kept"].items()}
        lost = [name for name in stayed if 2 * stayed[name] < pairs]  # "stayed in 0 of 8 or more" would say nothing
        for name in lost:
            changed = pairs - stayed.pop(name)
            told += f" {name.capitalize()} changed in {f'{changed} of' if changed < pairs else 'all'} {pairs} pictures."
        if stayed:
            worst = min(stayed, key=stayed.__getitem__)
            most = f"{stayed[worst]} of {pairs} pictures or more ({worst} changed most)"
            told += f" Everything else stayed in {most if stayed[worst] < pairs else f'all {pairs} pictures'}."
    return told


def findings(numbers: Mapping[str, Any]) -> list[str]:
    """The outcome in a few sentences."""
    found = [side_finding(numbers, name) for name in ("before", "after") if numbers[name]]
    if numbers["after"]:
        first, second = (side["fd_hard"] for side in sides_of(numbers))
        found.append(f"The counted discrepancy went from {first:.3f} to {second:.3f}.")
    if paired := numbers["paired"]:
        found.append(
            f"{percent(paired['changed'])} of the pictures changed class, where {percent(paired['needed'])} had to at "
            f"the least."
        )
    found += [judged_finding(judged)] if (judged := numbers["judged"]) and judged["judged"] else []
    fd, pictures = numbers["resolution"]["fd"], numbers["resolution"]["pictures"]
    if pictures:
        found.append(f"It takes {pictures} picture{'s' * (pictures > 1)} to tell a discrepancy of {fd} from chance.")
    return found


def judged_finding(judged: Mapping[str, Any]) -> str:
    """Which pictures people find better, in pairs."""
    together = judged["together"]
    first, neither, second = (round(share * together["n"]) for share in together["better"].values())
    people = len(judged["answers"])
    return (
        f"To {people} {'people' if people > 1 else 'person'} who did not know which is which, {judged['names'][0]} "
        f"looks better in {first} of {together['n']} pairs, {judged['names'][1]} in {second}, and {neither} show no "
        f"difference (p of no preference {equals(together['p_value'])})."
    )


def side_finding(numbers: Mapping[str, Any], name: str) -> str:
    """The class that is farthest from its target, and whether the target is reached, missed or neither is known.

    Of classes as far from it, the one that was asked for most.
    """
    side, target = numbers[name], numbers["target"]
    worst = max(range(len(target)), key=lambda i: (abs(side["shares"][i] - target[i]), target[i]))
    p, (low, high) = side["p_value"], side["fd_hard_ci"]
    if side["outcome"] == REACHED:
        verdict = f"The target is reached: the counted discrepancy is at most {high:.3f} (95 %)."
    elif side["outcome"] == OPEN:
        verdict = (
            f"The target is not excluded (p {equals(p)}), but {side['n']} pictures are too few to tell that it is "
            f"reached: the counted discrepancy may be up to {high:.3f}, small is {numbers['resolution']['fd']}."
        )
    elif p < 0.05:
        verdict = f"The target is missed: chance is a poor explanation of such a mix (p {equals(p)})."
    else:
        verdict = f"The target is missed: the counted discrepancy is at least {low:.3f} (95 %)."
    share, ends = percent(side["shares"][worst]), span(side["shares_ci"][worst], percent)
    shown = f"{share} of {side['n']} pictures show {numbers['classes'][worst]}"
    return f"{name.capitalize()}, {shown} (95 % interval {ends}); the target is {percent(target[worst])}. {verdict}"


def equals(p: float) -> str:
    return probability(p) if p < 0.001 else f"= {probability(p)}"


def left_open(numbers: Mapping[str, Any]) -> list[str]:
    """What could not be measured or should not be trusted, and why."""
    found = list(numbers["not_measured"])
    for name in ("before", "after"):
        side = numbers[name]
        if side and side["corrected"] and not side["corrected"]["plausible"]:
            found.append(
                f"The corrected shares {name} do not fit the errors that were counted: the classifier errs otherwise "
                "on these pictures. Do not rely on them; label pictures of this model and count again."
            )
    if numbers["after"] and numbers["paired"] is None:
        found.append("No picture shows a face both before and after, so pairs could not be compared.")
    if numbers["kept"] == {} and numbers["paired"]:
        found.append("The classifier knows no other attribute, so what else changed was seen in the pictures only.")
    if (judged := numbers["judged"]) and judged["judged"] < judged["pairs"]:
        missing = judged["pairs"] - judged["judged"]
        found.append(f"Pairs for Judge by Eye that nobody judged yet: {missing} of {judged['pairs']}.")
    return found


# --- plain text ---

JUDGED = "Judged by people"
LABEL, CELL = 26, 16  # columns of text: four fit into a narrow preview


def text_table(heads: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Lines of a table; intervals stand in a line of their own below the figures."""
    widths = [8 if head == "target" else CELL for head in heads]

    def line(label: str, cells: Sequence[str]) -> str:
        return (f"{label:{LABEL}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))).rstrip()

    lines = [line("", heads)] if any(heads) else []
    for row in rows:
        lines.append(line(row.label, row.figures))
        lines += [line("", row.intervals)] if any(row.intervals) else []
    return lines


def report_text(numbers: Mapping[str, Any]) -> str:
    """The report as text of about 66 columns."""
    lines = [in_short(numbers), f"{numbers['attribute']}, {numbers['n']} pictures", *findings(numbers), ""]
    lines += text_table(columns_of(numbers), fairness_rows(numbers))
    for title, heads, rows in joint_tables(numbers):
        lines += ["", title, *text_table(heads[1:], rows)]
    tables = ("Pairs", paired_rows), ("What else changed", change_rows), (JUDGED, judged_rows)
    for title, rows_of in tables:
        if rows := rows_of(numbers):
            lines += ["", title, *text_table([""], rows)]
    lines += ["", "Below each figure: its 95 % interval. Discrepancy: 0 is the target mix."]
    return "\n".join([*lines, *left_open(numbers)])


def judged_text(judged: Mapping[str, Any]) -> str:
    """What people say of pairs (`measure.judged_figures`), as text."""
    numbers = {"judged": judged}
    if not judged["judged"]:
        return "Nobody judged a pair yet."
    return "\n".join([judged_finding(judged), "", *text_table([""], judged_rows(numbers))])
