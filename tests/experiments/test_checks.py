"""The verdicts of the single checks, from outcomes as they might be."""

from __future__ import annotations

import numpy as np
import pytest

from difflens_core.experiments.checks import BAD, DOUBTFUL, GOOD, check_choice, check_dose
from difflens_core.experiments.outcomes import DOSES, Outcome, Part


def outcome(success: float, change: float = 0.1, n: int = 20) -> Outcome:
    hit = (np.arange(n) < success * n).astype(float)
    return Outcome(0.02 + 0.96 * hit, hit, change, {"light": success})


def response(*successes: float) -> dict[float, Outcome]:
    """Outcomes at -1, 0, .5, 1, 1.5 and 2 times the strength."""
    return dict(zip(sorted([0.0, *DOSES]), map(outcome, successes), strict=True))


@pytest.mark.parametrize(
    ("parts", "verdict", "words"),
    [
        ([(1, 0.5, 0), (4, 0.9, 0)], GOOD, "Right features: the recipe's 4 features turn 90%"),
        ([(1, 0.5, 0.2), (4, 0.9, 0.6)], BAD, "as many random ones as strong 60%; it is the size"),
        ([(1, 0.1, 0), (4, 0.9, 0)], DOUBTFUL, "Many weak features"),
        ([(1, 0.5, None), (4, 0.9, None)], GOOD, "random ones were not tried"),
    ],
)
def test_the_ablation_curve_is_judged(parts, verdict, words):
    parts = [Part(n, outcome(best), None if random is None else outcome(random)) for n, best, random in parts]
    check = check_choice(response(0, 0, 0.5, 0.9, 0.9, 1), parts)
    assert check.verdict == verdict and words in check.evidence


@pytest.mark.parametrize(
    ("successes", "verdict", "words"),
    [
        ((0, 0, 0.5, 0.9, 0.9, 0.95), GOOD, "Enough: turned are 90% (light 90%), at twice the strength 95%"),
        ((0, 0, 0.1, 0.2, 0.5, 0.9), BAD, "Too weak: turned are 20%"),
        ((0, 0, 0.2, 0.6, 0.8, 0.9), DOUBTFUL, "Too weak: turned are 60%"),
        ((0, 0, 0.9, 0.6, 0.3, 0.2), DOUBTFUL, "Too strong: turned are 60% (light 60%), at 0.5 times the strength 90%"),
        ((0, 0, 0.6, 0.6, 0.6, 0.6), DOUBTFUL, "Saturated: turned are 60%"),
        ((0, 0, 0, 0, 0, 0), BAD, "Features do not move the output to the class: at the best of the strengths turn 0%"),
        (
            (0, 0, 0, 0, 0.1, 0.3),
            BAD,
            "Features do not move the output to the class: at the best of the strengths turn 30%",
        ),
        ((0.9, 0, 0, 0, 0, 0), BAD, "Steers backwards: turned are 0% (light 0%), at the reversed strength 90%"),
    ],
)
def test_the_dose_response_is_judged(successes, verdict, words):
    check = check_dose(response(*successes))
    assert check.verdict == verdict and words in check.evidence, check.evidence
    assert (check.advice == "") == (verdict == GOOD)
