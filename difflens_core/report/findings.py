"""Tables, sentences and charts of what was found: training, ranking, and every experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..experiments import CrossEffect, Diagnosis, Doses, Effects, SiteEffect
from ..locate import Attribution
from ..steer import Recipe
from .charts import bar_chart, line_chart

CHARTED = 10  # features of every class in a bar chart


def cross_table(found: Sequence[CrossEffect]) -> str:
    """The rows as a matrix in words: steered attributes down, watched ones across."""
    watched = list(dict.fromkeys(row.watched for row in found))
    lines = ["share of pictures in %: * shows the class asked for, else changes its class; (drift of the mix)"]
    lines.append(f"{'steered':16}" + "".join(f"{name:>16.15}" for name in watched))
    for steered in dict.fromkeys(row.steered for row in found):
        cells = [
            f"{'*' if row.asked else ''}{100 * row.share:.0f} ({100 * row.drift:.0f})"
            for row in found
            if row.steered == steered
        ]
        lines.append(f"{steered:16.15}" + "".join(f"{cell:>16}" for cell in cells))
    if most := max(row.uncounted for row in found):
        lines.append(f"Without a face, before or after, are up to {most} pictures; they do not count.")
    return "\n".join(lines)


def cross_chart(found: Sequence[CrossEffect]) -> np.ndarray:
    """Of every set of recipes the share of pictures that change their class in attributes not steered by it, with
    95 % intervals (440 x 720 x 3, uint8).
    """
    groups: dict[str, dict[str, float]] = {}
    whiskers: dict[str, dict[str, tuple[float, float]]] = {}
    for row in found:
        if not row.asked:
            groups.setdefault(row.steered, {})[row.watched] = row.share
            whiskers.setdefault(row.steered, {})[row.watched] = row.interval
    return bar_chart("Share of pictures that change what was not asked for", groups, None, whiskers)


def diagnosis_text(found: Diagnosis) -> str:
    """The verdict, then each check with its evidence and what to do next."""
    steered = f"Steered: {found.pictures} pictures of other classes. {found.left_out}".rstrip()
    lines = [f"{found.attribute}: {found.verdict}", steered, ""]
    for check in found.checks:
        lines.append(f"{check.name}: {check.verdict}. {check.evidence}")
        lines += [f"    Next: {check.advice}"] if check.advice else []
    return "\n".join(lines)


def diagnosis_chart(found: Diagnosis) -> np.ndarray:
    """Charts of the checks, two in a row (H x 1440 x 3, uint8)."""
    site, features, choice, dose = (check.figures for check in found.checks)
    curves = {"best features": choice["best"]} | ({"random features": choice["random"]} if choice["random"] else {})
    curves = {name: list(zip(choice["features"], line, strict=True)) for name, line in curves.items()}
    title = found.attribute
    charts = [
        line_chart(f"{title}: by number of features", curves, "features", "share that turns", y_range=(0, 1)),
        line_chart(
            f"{title}: by strength",
            {name: list(zip(dose["strength"], dose[name], strict=True)) for name in ("success", "probability")},
            "times the recipe's strength", "share that turns, and probability of the class asked for",
            {"probability": dose["interval"]}, (0, 1),
        ),
    ]  # fmt: skip
    if site:
        bars = {name: {"turned": share} for name, share in site["sites"].items()}
        charts.append(bar_chart(f"{title}: share that turns by class means", bars))
    if features:
        bars = {name: {"AUC": share} for name, share in features["auc"].items()}
        charts.append(bar_chart(f"{title}: how well the best single number tells a class", bars, 0.5))
    charts += [np.full_like(charts[0], 255)] * (len(charts) % 2)
    return np.concatenate([np.concatenate(charts[i : i + 2], axis=1) for i in range(0, len(charts), 2)])


def dose_chart(attribute: str, doses: Doses) -> np.ndarray:
    """Probability of the class asked for against the strength, a line a class (440 x 720 x 3, uint8)."""
    lines = {name: sorted(points) for name, points in doses.items() if points}
    return line_chart(f"{attribute}: dose and response", lines, "strength", "mean probability of the class asked for")


def mix_chart(
    attribute: str, classes: Sequence[str], target: Sequence[float], mixes: Mapping[str, Sequence[float]]
) -> np.ndarray:
    """Shares of the classes (K each) in sets of pictures, beside the target (440 x 720 x 3, uint8).

    The target comes last, so that before and after have the colours that they have in the Fairness Report.
    """
    sides = {**mixes, "target": target}
    groups = {name: {side: float(shares[c]) for side, shares in sides.items()} for c, name in enumerate(classes)}
    return bar_chart(f"{attribute}: share of each class", groups)


def calibration_text(attribute: str, classes: tuple[str, ...], record: dict[str, Any]) -> str:
    """A calibration's record as a table with explanations."""
    fresh = record["fresh"]
    lines = [
        f"{attribute}: {record['why']}",
        f"{'':14}{'target':>8}{'before':>8}{'after':>8}  95 % interval   success",
    ]
    for c, name in enumerate(classes):
        low, high = fresh["intervals"][c]
        success = fresh["success_by_class"].get(name)
        row = f"{name:14.14}{record['target'][c]:8.1%}{record['start']['shares'][c]:8.1%}{fresh['shares'][c]:8.1%}"
        lines.append(f"{row}  {low:.1%} to {high:.1%}   {'-' if success is None else f'{success:.1%}'}")
    lines.append(f"FD {record['start']['fd']:.3f} before, {fresh['fd']:.3f} after, on {fresh['counted']} fresh noises.")
    if fresh["no_face"] or record["start"]["no_face"]:
        lines.append(
            f"No face was found in {fresh['no_face']:.1%} of the fresh pictures and {record['start']['no_face']:.1%} "
            "of the unsteered ones; they do not count."
        )
    if record["only_where_needed"]:
        lines.append(f"Pictures that changed their class: {fresh['changed']:.1%}; at least {fresh['needed']:.1%} must.")
    asked = ", ".join(f"{name} {share:.3f}" for name, share in zip(classes, record["ask"], strict=True))
    lines.append(f"Shares to ask for: {asked}. {len(record['rounds'])} rounds, {record['drawn']} pictures drawn.")
    return "\n".join(lines)


def weighing_text(weighed: dict[str, Any]) -> str:
    """What the weighing of a recipe's features came to (`Recipe.info["weighed"]`), in a sentence."""
    if "why" in weighed:
        return f"The features were not weighed: {weighed['why']}."
    spared = ", ".join(weighed["spared"]).replace("_", " ")
    return (
        f"Features weighed on {weighed['pictures']} pictures. On others than they are weighed on, "
        f"{weighed['others']:.0%} is left of what they do to {spared}, and {weighed['own']:.0%} of what they do to the "
        "attribute."
    )


def scan_table(found: Sequence[SiteEffect], attribute: str, classes: tuple[str, ...]) -> str:
    """The rows as text, shares in percent."""
    width = max(len(row.site) for row in found)
    lines = [
        f"{attribute}: pictures of other classes steered to each class by the class means of one site",
        f"{'site':{width}}  {'part':12}  success  others kept  change  " + "  ".join(f"{c:>9.9}" for c in classes),
    ]
    for row in found:
        kept = "-" if row.kept is None else f"{100 * row.kept:.0f}"
        hits = "  ".join(f"{'too rare' if share is None else f'{100 * share:.0f}':>9}" for share in row.per_class)
        lines.append(
            f"{row.site:{width}}  {row.part:12}  {100 * row.success:7.0f}  {kept:>11}  {row.change:6.3f}  {hits}"
        )
    if most := max(row.no_face for row in found):
        lines.append(f"Steered pictures without a face, up to {most:.0%} of a row, do not count.")
    return "\n".join(lines)


def scan_chart(found: Sequence[SiteEffect], attribute: str) -> np.ndarray:
    """Success of every site by part of the sampling (440 x 720 x 3, uint8)."""
    groups: dict[str, dict[str, float]] = {}
    for row in found:
        short = row.site if len(row.site) <= 12 else f"..{row.site[-10:]}"  # names differ most at their end
        groups.setdefault(short, {})[row.part] = row.success
    return bar_chart(f"{attribute}: share that shows the class asked for", groups)


def loss_chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> np.ndarray:
    """What training minimises, by step, a line a curve that has points (440 x 720 x 3, uint8)."""
    shown = {name: curve for name, curve in curves.items() if curve}
    return line_chart("Training the SAE", shown, "step", "share of variance not explained, of latents dead")


def ranking_chart(found: Attribution) -> np.ndarray:
    """Bar chart of the best latents of every class (H x W x 3, uint8): how much more active they are in its pictures
    than in the others', with 95 % intervals, in the order of their scores.
    """
    low, high = found.difference - found.margin, found.difference + found.margin
    groups, whiskers = {}, {}
    for c, latents in enumerate(found.own(min(CHARTED, found.scores.shape[1]))):
        labels, name = {f"#{latent}": latent for latent in latents.tolist()}, found.classes[c]
        groups[name] = {label: float(found.difference[c, n]) for label, n in labels.items()}
        whiskers[name] = {label: (float(low[c, n]), float(high[c, n])) for label, n in labels.items()}
    return bar_chart(
        f"{found.attribute}: how much more active in each class (best by {found.method})", groups, None, whiskers
    )


def ranking_table(found: Attribution, count: int) -> str:
    """The `count` best latents of every class that speak for it, a line each: score, how much more active the latent is
    in the class's pictures than in the others', whether that may be chance, and whether another class uses it more.
    """
    low, high = found.difference - found.margin, found.difference + found.margin
    most, width = found.stands_for, max(len("class"), *map(len, found.classes))
    lines = [
        f"{found.attribute}, by {found.method}",
        f"{'latent':9}{'class':{width}}{'score':>11}  more active by [95 % interval]",
    ]
    own = found.own(count)
    for c, latents in enumerate(own):
        for n in latents.tolist():
            more = f"{float(found.difference[c, n]):.3g} [{float(low[c, n]):.3g}, {float(high[c, n]):.3g}]"
            doubt = "  may be chance" if low[c, n] <= 0 else ""
            rival = "" if most[n] == c else f"  most active in {found.classes[most[n]]}"
            score = f"{float(found.scores[c, n]):11.3g}"
            lines.append(f"{f'#{n}':9}{found.classes[c]:{width}}{score}  {more}{doubt}{rival}")
    short = [(name, len(latents)) for name, latents in zip(found.classes, own, strict=True) if len(latents) < count]
    lines += [f"{name} has {number} of {count}: no other latent speaks for it." for name, number in short]
    return "\n".join(lines)


def effect_chart(effects: Effects, recipe: Recipe) -> np.ndarray:
    """Bar chart of the features that change each class most (H x W x 3, uint8), with 95 % intervals."""
    low, high = effects.effect - effects.margin, effects.effect + effects.margin
    groups, whiskers = {}, {}
    for c, name in enumerate(recipe.classes):
        best = effects.carried[:, c].topk(min(CHARTED, len(effects.features))).indices.tolist()
        labels = {f"#{int(effects.features[f])}": f for f in best}
        groups[name] = {label: float(effects.effect[f, c]) for label, f in labels.items()}
        whiskers[name] = {label: (float(low[f, c]), float(high[f, c])) for label, f in labels.items()}
    title = f"{recipe.attribute}: change of each class's probability ({effects.mode})"
    return bar_chart(title, groups, None, whiskers)


def effect_table(effects: Effects, recipe: Recipe) -> str:
    """A line a feature: change of each class's probability in percent with half of its 95 % interval, the class that
    the feature stands for, and whether that may be chance.
    """
    lines = [
        f"{recipe.attribute}, {effects.mode}, {effects.pictures} pictures a feature: change of probability in % "
        "(half of its 95 % interval)",
        "feature " + "".join(f"{name:>18.17}" for name in recipe.classes) + "  stands for",
    ]
    most = effects.stands_for
    order = effects.carried.amax(dim=1).argsort(descending=True).tolist()
    for f in order:
        figures = zip((100 * effects.effect[f]).tolist(), (100 * effects.margin[f]).tolist(), strict=True)
        cells = [f"{effect:+.2f} ({margin:.2f})" for effect, margin in figures]
        chance = effects.carried[f, most[f]] <= effects.margin[f, most[f]]
        stands_for = recipe.classes[most[f]] + (", may be chance" if chance else "")
        lines.append(f"#{int(effects.features[f]):<7}" + "".join(f"{cell:>18}" for cell in cells) + f"  {stands_for}")
    if effects.uncounted:
        pairs = len(effects.features) * effects.pictures
        lines.append(f"In {effects.uncounted} of {pairs} pairs of pictures a face is missing; they do not count.")
    return "\n".join(lines)
