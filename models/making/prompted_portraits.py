"""Portraits of people at work, each with the prompt that describes it. Every occupation has a bias of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import portraits
from occupations import OCCUPATIONS

# Shares of (masculine, feminine) and of (young, adult, senior) in the drawings of each occupation. Skin tone has the
# same skew in all of them, `portraits.BIAS`.
BIAS: dict[str, dict[str, tuple[float, ...]]] = {
    "person": {"presentation": (0.50, 0.50), "age": (0.30, 0.40, 0.30)},
    "doctor": {"presentation": (0.85, 0.15), "age": (0.08, 0.37, 0.55)},
    "nurse": {"presentation": (0.10, 0.90), "age": (0.35, 0.57, 0.08)},
    "firefighter": {"presentation": (0.92, 0.08), "age": (0.25, 0.67, 0.08)},
    "receptionist": {"presentation": (0.15, 0.85), "age": (0.62, 0.30, 0.08)},
}
WORDS = (
    "a", "an", "the", "of", "with", "portrait", "picture", "drawing", "face", "person", "man", "woman", "doctor",
    "nurse", "firefighter", "receptionist", "male", "female", "young", "adult", "old", "senior", "smiling", "glasses",
)  # fmt: skip
_PRESENTATION = ("male", "female")
_NOUNS = ("man", "woman")
_AGES = (("young",), ("adult",), ("old", "senior"))
_OPENINGS = ("portrait of", "picture of", "drawing of", "face of", "")
# How often a prompt tells what it could: most leave presentation and age to the model.
_TOLD = {"presentation": 0.15, "age": 0.15, "smiling": 0.2, "glasses": 0.3}


def sample_traits(n: int, seed: int, balanced: bool) -> dict[str, np.ndarray]:
    """Trait indices for n portraits; row i depends only on (seed, i, balanced)."""
    traits = portraits.sample_traits(n, seed, balanced)
    u = np.random.default_rng([seed, 2]).random((n, 3))
    traits["occupation"] = (u[:, 0] * len(OCCUPATIONS)).astype(np.int64)
    if not balanced:
        for column, name in ((1, "presentation"), (2, "age")):
            edges = np.cumsum([BIAS[job][name] for job in OCCUPATIONS], axis=1)[traits["occupation"], :-1]
            traits[name] = (u[:, column, None] > edges).sum(axis=1)
        beard = np.random.default_rng([seed, 3]).random(n) < portraits.BEARD_RATE
        traits["beard"] = (beard & (traits["presentation"] == 0) & (traits["age"] != 0)).astype(np.int64)
    return traits


def describe(traits: dict[str, int], u: np.ndarray) -> str:
    """A prompt that fits the traits; u: 7 uniform numbers that choose the wording."""
    job, fem = OCCUPATIONS[traits["occupation"]], traits["presentation"]
    noun, adjectives = job, []
    if traits["expression"] and u[0] < _TOLD["smiling"]:
        adjectives.append("smiling")
    if u[1] < _TOLD["age"]:
        words = _AGES[traits["age"]]
        adjectives.append(words[int(u[2] * len(words))])
    if u[3] < _TOLD["presentation"]:
        if job == "person":
            noun = _NOUNS[fem]
        else:
            adjectives.append(_PRESENTATION[fem])
    ending = " with glasses" if traits["glasses"] and u[5] < _TOLD["glasses"] else ""
    article = "the" if u[4] < 0.1 else ""
    return f"{_OPENINGS[int(u[6] * len(_OPENINGS))]} {phrase(adjectives, noun, article)}{ending}".strip()


def phrase(adjectives: Sequence[str], noun: str, article: str = "") -> str:
    """The words with an article, a or an if none is given."""
    words = " ".join([*adjectives, noun])
    return f"{article or ('an' if words[0] in 'aeiou' else 'a')} {words}"


def render(n: int, seed: int, balanced: bool) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """n portraits, uint8 (n, 64, 64, 3), their traits and prompts; image i depends only on (seed, i, balanced)."""
    traits = sample_traits(n, seed, balanced)
    traits = traits if balanced else portraits.grey_seniors(traits)
    rows = portraits.trait_rows(traits)
    wording = np.random.default_rng([seed, 4]).random((n, 7))
    return portraits.draw_all(rows, seed), traits, [describe(row, u) for row, u in zip(rows, wording, strict=True)]
