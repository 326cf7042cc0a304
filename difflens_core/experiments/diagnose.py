"""Why steering does or does not work: four checks in the order in which one thing needs the other.

site -> features taken apart -> the right features -> the dose. The first one that fails is the one to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..activations import Activations, Draw
from ..classifiers import faces_missing
from ..sae import SparseAutoencoder
from ..steer import Recipe, at_dose, check_one_site
from .checks import BAD, DOUBTFUL, Check, check_choice, check_dose, check_features, check_site
from .draw import Run
from .outcomes import DOSES, SHARES, UNSTEERED, Experiment, Read, ablation

OTHER_SITES = 4  # a few tell whether the recipe's site is the odd one out


@dataclass(frozen=True)
class Diagnosis:
    """The verdict in one sentence, and the checks in causal order.

    pictures: how many were steered, the same by all; left_out: a sentence on those without a face, if there are any.
    """

    attribute: str
    pictures: int
    verdict: str
    checks: tuple[Check, ...]
    left_out: str = ""


def diagnose(
    recipe: Recipe,
    draw: Draw,
    read: Read,
    pictures: int = 16,
    sites: Sequence[str] = (),
    sae: SparseAutoencoder | None = None,
    activations: Activations | None = None,
    labels: Tensor | None = None,
    batch: int = 32,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    on_dose: Callable[[Sequence[tuple[float, float]]], None] = lambda turned: None,
) -> Diagnosis:
    """Run the checks that the inputs allow; the others are "not checked".

    read(images) gives the class probabilities (B x K) of every attribute. `UNSTEERED` x `pictures` noises of `draw`
    are sampled as they are; then, for every measurement, up to `pictures` of them that do not show a class are drawn
    again and steered to it. sites: other sites, of which some are tried; sae: the recipe's, for the random features;
    with activations of the recipe's site and the labels (B) of their pictures it is itself checked.
    on_picture(done, total) may raise to cancel. on_dose is told the strengths tried so far, each with the share that
    turns.
    """
    check_one_site(recipe, "Diagnose")
    ranked = recipe.levels.positions > 0  # without levels nothing tells which features are best, or an edit's norm
    shares = SHARES if ranked else (1.0,)
    controls = sae if sae and ranked and sae.latents >= 2 * len(recipe.features) else None
    sites = [recipe.site, *evenly(sites, OTHER_SITES)] if sites else []
    per_site = max(2, pictures // 2)
    scan = (UNSTEERED * pictures + len(sites) * len(recipe.classes) * per_site) if sites else 0
    measured = len(DOSES) + len(shares) - 1 + (len(shares) if controls else 0)
    run = Run(draw, batch, UNSTEERED * pictures + measured * len(recipe.classes) * pictures + scan, on_picture)
    experiment = Experiment.begin(run, read, recipe, sae, pictures)
    run.total = run.done + measured * len(experiment.numbers) + scan
    doses = {0.0: experiment.before()}
    for dose in DOSES:
        doses[dose] = experiment.steered(at_dose(recipe, dose))
        on_dose(sorted((strength, outcome.success) for strength, outcome in doses.items()))
    parts = ablation(experiment, shares, controls, doses[1.0])
    features = check_features(recipe, sae, activations, labels, lambda: on_picture(run.done, run.total))
    checks = (
        check_site(experiment, sites, per_site, doses[1.0]),
        features,
        check_choice(doses, parts),
        check_dose(doses),
    )
    left_out = [faces_missing(experiment.labels)]
    if lost := doses[1.0].no_face:
        left_out.append(f"At the recipe's strength {lost} of the steered pictures show none.")
    said = " ".join(filter(None, left_out))
    return Diagnosis(recipe.attribute, len(experiment.numbers), overall(checks), checks, said)


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Up to `count` of the names, evenly spread."""
    at = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[i] for i in at]


def overall(checks: Sequence[Check]) -> str:
    """The evidence of the first check that fails; else of the first that is doubtful."""
    for verdict, opening in ((BAD, ""), (DOUBTFUL, "Nothing fails, but this is doubtful. ")):
        for check in checks:
            if check.verdict == verdict:
                return opening + check.evidence
    return "Nothing wrong found."
