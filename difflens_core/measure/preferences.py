"""How often people find the one picture of a pair better, what they see changed, and how sure that is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from .intervals import wilson_interval
from .judgements import FIRST, KINDS, NEITHER, NOTHING, OF_CHANGE, SECOND, Judged, Judgement
from .significance import sign_test

CHOICES = (FIRST, NEITHER, SECOND)
Answer = tuple[str, tuple[str, ...]]  # which is better, and what changed


def judged_figures(judged: Judged) -> dict[str, Any]:
    """All figures of pairs that people judged, as plain values.

    names, attribute; pairs, judged: how many there are, and of how many anybody said something; answers: how many
    there are, by judge; together, by_judge: the fields of `answer_figures`, of the pairs and of each judge's own
    (None, and empty, if nobody said anything); agreement, alpha: of `agreement`; left: `share_of` how often the left
    picture was chosen, where one was; looked: `share_of` how often it was seen that a pair's pictures are the same
    (None where there were no such).
    """
    pairs = judged.pairs[: len(judged.pairs) - judged.catches]
    marks, same = {pair.mark for pair in pairs}, {pair.mark for pair in judged.pairs if pair.equal}
    by_pair: dict[str, list[Judgement]] = defaultdict(list)
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for one in judged.judgements:
        if one.pictures in marks:
            by_pair[one.pictures].append(one)
            by_judge[one.judge].append(one)
    chosen = [one.better == one.left for said in by_pair.values() for one in said if one.better != NEITHER]
    seen = [
        one.better == NEITHER and one.changed == (NOTHING,) for one in judged.judgements if one.pictures in same
    ]  # fmt: skip
    return {
        "names": judged.names, "attribute": judged.attribute, "pairs": len(pairs), "judged": len(by_pair),
        "answers": {judge: len(said) for judge, said in by_judge.items()},
        "together": answer_figures([most_say(said) for said in by_pair.values()]) if by_pair else None,
        "by_judge": {
            judge: answer_figures([(one.better, one.changed) for one in said]) for judge, said in by_judge.items()
        },
        **agreement([[one.better for one in said] for said in by_pair.values()]),
        "left": share_of(chosen), "looked": share_of(seen),
    }  # fmt: skip


def most_say(said: Sequence[Judgement]) -> Answer:
    """One answer for a pair: what more judges say than anything else ("neither" if that is nothing), and the kinds of
    change that more than half of them name.
    """
    better, named = Counter(one.better for one in said), Counter(kind for one in said for kind in one.changed)
    (choice, most), *others = better.most_common()
    changed = tuple(kind for kind in OF_CHANGE if 2 * named[kind] > len(said))
    return NEITHER if others and others[0][1] == most else choice, changed or (NOTHING,)


def answer_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares of n answers, one a pair, each with Wilson's 95 % interval.

    better: of "first", "neither" and "second"; changed: of each kind; p_value: how often as one-sided a choice would
    come about if people chose by tossing a coin.
    """
    better = Counter(choice for choice, _ in answers)
    named = Counter(kind for _, changed in answers for kind in changed)
    figures: dict[str, Any] = {"n": len(answers), "p_value": sign_test(better[FIRST], better[SECOND])}
    for name, counts, keys in (("better", better, CHOICES), ("changed", named, KINDS)):
        figures[name] = {key: counts[key] / len(answers) for key in keys}
        figures[f"{name}_ci"] = {key: interval(counts[key], len(answers)) for key in keys}
    return figures


def interval(count: int, n: int) -> tuple[float, float]:
    low, high = wilson_interval(count, n)
    return float(low), float(high)


def share_of(found: Sequence[bool]) -> dict[str, Any] | None:
    """How many of n are true, as a share with Wilson's 95 % interval; None if there is nothing."""
    if not found:
        return None
    return {"n": len(found), "share": sum(found) / len(found), "share_ci": interval(sum(found), len(found))}


def agreement(said: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """How far judges agree: agreement, the share of equal answers among all two judges on a pair, and alpha.

    said: for each pair its judges' answers. Krippendorff's alpha (nominal, pairs may lack judges) is 1 where all agree
    and 0 where they agree as by chance: 1 - Do / De, each pair of answers weighed by 1 / (answers on the pair - 1).
    None if no pair has two judges; alpha also if everybody always says the same, which chance explains as well.
    """
    shared = [answers for answers in said if len(answers) > 1]
    equal = [one == other for answers in shared for one, other in combinations(answers, 2)]
    counts = Counter(answer for answers in shared for answer in answers)
    n = counts.total()
    expected = n * n - sum(count**2 for count in counts.values())
    observed = sum(
        (len(answers) ** 2 - sum(count**2 for count in Counter(answers).values())) / (len(answers) - 1)
        for answers in shared
    )
    return {
        "agreement": sum(equal) / len(equal) if equal else None,
        "alpha": 1 - (n - 1) * observed / expected if expected else None,
    }
