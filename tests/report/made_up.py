"""Readings, pictures and summaries made up for the tests of reports."""

from __future__ import annotations

import numpy as np
import torch

from difflens_core.classifiers.readings import NO_FACE
from difflens_core.measure import Judged, Judgement, Pair, judged_figures
from difflens_core.report import Question, summary
from difflens_core.report.rows import NAMES

ATTRIBUTES = {"age": ("young", "adult", "senior"), "tone": ("light", "dark"), "glasses": ("no", "yes")}
N = 40


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


def judged(names: tuple[str, str] = ("before", "after"), judge: str = "anna", attribute: str = "age") -> dict:
    """Figures of six pairs, of which two judges judged five; two pairs more are one picture twice."""
    pairs = tuple(Pair(number, f"p{number}", number > 6) for number in range(1, 9))
    said = [
        Judgement("2030-01-02", name, f"p{number}", number, number > 6, *names, "first", better, changed)
        for name, choices in ((judge, "sssnf.nn"), ("ben", "ssffs.sn"))
        for number, choice in enumerate(choices, start=1) if choice != "."
        for better, changed in [{
            "s": ("second", ("attribute", "hair")), "f": ("first", ("hair",)), "n": ("neither", ("nothing",)),
        }[choice]]
    ]  # fmt: skip
    return judged_figures(Judged(names, attribute, pairs, 2, tuple(said)))


def full() -> dict:
    after = readings(2) | {NO_FACE: torch.zeros(N)}
    return numbers_of(readings(1, faces=True), after, np.arange(N) % 3, **EVERYTHING) | {"judged": judged()}


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (N, 48, 64, 3), dtype=np.uint8)
