"""Why steering does or does not work: four checks in the order in which one thing needs the other.

site -> features taken apart -> the right features -> the dose. The first one that fails is the one to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .activations import Activations
from .attribution import contrast
from .causal import keep_best
from .classifier import decided
from .controls import random_features, with_latents
from .fairness import pixel_change
from .files import DiffLensError
from .plots import bar_chart, line_chart
from .recipes import Recipe, at_dose
from .sae import SparseAutoencoder
from .sampling import Draw
from .scan import Run, scan_sites, shown_classes
from .separation import measure_separation
from .steering import Steering
from .training import hold_out, measure_sae

GOOD, DOUBTFUL, BAD, NOT_CHECKED = "good", "doubtful", "bad", "not checked"

# Unsteered pictures for every picture steered to a class: enough of a class that one picture in four shows.
UNSTEERED = 4
# Times the recipe's own strength. Reversed too: pictures of other classes have no probability to lose.
DOSES = (-1.0, 0.5, 1.0, 1.5, 2.0)
# Shares of every class's features, best first, all of them last.
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
OTHER_SITES = 4  # a few tell whether the recipe's site is the odd one out

# Success is the share of pictures of other classes that turn. By chance alone none of them does.
WORKS = 0.8  # with four in five turned, a fair mix is near and a higher strength brings the rest
SOME = 0.4  # half of that: below, a mix hardly moves
# Random features that turn half as many as the recipe's: then it is the size of the edit that turns pictures.
RANDOM_SHARE = 0.5
# The best quarter of the features should do at least its share; less, and the ranking put the wrong ones first.
QUARTER_SHARE = 0.25
# Mean change of a pixel, of 1, that nobody sees: one of 256 levels.
UNSEEN = 1 / 256
# Another site must turn this much more than the recipe's, and more than two standard errors, to be called better.
SITE_GAP = 0.25
# Unexplained variance: beyond a half, most of what the site holds is out of the latents' reach; three tenths are worth
# more training.
FVU_DOUBTFUL, FVU_BAD = 0.3, 0.5
DEAD_DOUBTFUL = 0.5  # every second latent never fires: the SAE is smaller than it says
# AUC of the best single latent: .5 is chance; above .8 it is seldom wrong, below .65 it hardly beats a guess.
AUC_DOUBTFUL, AUC_BAD = 0.8, 0.65
# The best single latent should not tell much less than the best raw channel.
AUC_LOSS = 0.1


@dataclass(frozen=True)
class Check:
    """What one check found. verdict: good, doubtful, bad or not checked; evidence and advice: a sentence each."""

    name: str
    figures: dict[str, Any]
    verdict: str
    evidence: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The verdict in one sentence, and the checks in causal order. pictures: how many were steered, the same by all."""

    attribute: str
    pictures: int
    verdict: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Outcome:
    """What one edit did to the same n pictures of other classes.

    probability: n, of the class asked for; hit: n, whether the picture shows it; change: mean pixel difference, of 1;
    per_class: share of hits by the class asked for.
    """

    probability: np.ndarray
    hit: np.ndarray
    change: float
    per_class: dict[str, float]

    @property
    def success(self) -> float:
        return float(self.hit.mean())

    @property
    def in_words(self) -> str:
        """Success of all and by class."""
        return f"{self.success:.0%} ({', '.join(f'{name} {share:.0%}' for name, share in self.per_class.items())})"


@dataclass(frozen=True)
class Part:
    """The best `features` of a recipe, and as many random ones with an edit of the same norm (None without an SAE)."""

    features: int
    best: Outcome
    random: Outcome | None


Read = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Experiment:
    """The pictures that are steered: from noises `numbers` (n), each to class `target` (n), which it does not show.

    unsteered: the pictures of all noises as they are; probability: their class probabilities; labels: their classes.
    """

    run: Run
    read: Read
    recipe: Recipe
    sae: SparseAutoencoder | None
    unsteered: Tensor
    probability: Tensor
    numbers: Tensor
    target: Tensor

    @classmethod
    def begin(cls, run: Run, read: Read, recipe: Recipe, sae: SparseAutoencoder | None, pictures: int) -> Experiment:
        """Draw the unsteered pictures and choose up to `pictures` for each class."""
        unsteered = run.draw(torch.arange(UNSTEERED * pictures), lambda rows: [])
        readings = read(unsteered)
        probability = readings[recipe.attribute].cpu()
        labels, known = probability.argmax(dim=1), decided(readings).cpu()
        others = [(known & (labels != c)).nonzero().flatten()[:pictures] for c in range(len(recipe.classes))]
        numbers = torch.cat(others)
        if len(numbers) < 2:
            raise DiffLensError(
                f"{recipe.attribute}: no face was found in the {len(unsteered)} unsteered pictures. Look at them, or "
                "set face_detector to none in Load Attribute Classifier."
            )
        target = torch.cat([torch.full_like(mine, c) for c, mine in enumerate(others)])
        return cls(run, read, recipe, sae, unsteered, probability, numbers, target)

    @property
    def labels(self) -> Tensor:
        return self.probability.argmax(dim=1)

    def before(self) -> Outcome:
        """The pictures without steering: none shows the class that it will be asked for."""
        return self.outcome(self.probability[self.numbers], self.unsteered[self.numbers])

    def steered(self, recipe: Recipe) -> Outcome:
        """The same pictures, steered by `recipe`, without the SAE if it can."""
        sae = self.sae if recipe.needs_sae else None

        def edits(rows: Tensor) -> list[Steering]:
            return [Steering(recipe, lambda images: self.target[rows[images]], sae)]

        after = self.run.draw(self.numbers, edits)
        return self.outcome(self.read(after)[recipe.attribute].cpu(), after)

    def outcome(self, probability: Tensor, after: Tensor) -> Outcome:
        own = probability.gather(1, self.target[:, None])[:, 0].double()
        hit = (probability.argmax(dim=1) == self.target).double()
        per_class = {self.recipe.classes[c]: float(hit[self.target == c].mean()) for c in self.target.unique().tolist()}
        before = self.unsteered[self.numbers]
        return Outcome(own.numpy(), hit.numpy(), pixel_change(before.numpy(), after.numpy()), per_class)


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
) -> Diagnosis:
    """Run the checks that the inputs allow; the others are "not checked".

    read(images) gives the class probabilities (B x K) of every attribute. `UNSTEERED` x `pictures` noises of `draw`
    are sampled as they are; then, for every measurement, up to `pictures` of them that do not show a class are drawn
    again and steered to it. sites: other sites, of which some are tried; sae: the recipe's, for the random features;
    with activations of the recipe's site and the labels (B) of their pictures it is itself checked.
    on_picture(done, total) may raise to cancel.
    """
    ranked = recipe.levels.shape[-1] > 0  # without levels nothing tells which features are best, or an edit's norm
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
    doses |= {dose: experiment.steered(at_dose(recipe, dose)) for dose in DOSES}
    parts = ablation(experiment, shares, controls, doses[1.0])
    features = check_features(recipe, sae, activations, labels, lambda: on_picture(run.done, run.total))
    checks = (
        check_site(experiment, sites, per_site, doses[1.0]),
        features,
        check_choice(doses, parts),
        check_dose(doses),
    )
    return Diagnosis(recipe.attribute, len(experiment.numbers), overall(checks), checks)


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Up to `count` of the names, evenly spread."""
    at = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[i] for i in at]


def probe_score(recipe: Recipe) -> Tensor:
    """How much each latent speaks for each class (K x F) by the recipe's own levels and probes.

    The contrastive score of Attribute Features, from what the recipe holds: it does not say by what it was ranked.
    """
    steps = zip(recipe.levels.float().mean(dim=-1), recipe.probe_weight, strict=True)
    return sum(contrast(level) * contrast(weight @ recipe.decoder.T) for level, weight in steps)


def ablation(
    experiment: Experiment, shares: Sequence[float], sae: SparseAutoencoder | None, whole: Outcome
) -> list[Part]:
    """Steering by the best features of every class alone, for each share of them, and by random ones if there is `sae`.

    whole: what all features do. The random sets lie in each other, as the best ones do.
    """
    recipe, found = experiment.recipe, []
    score, most = probe_score(recipe) if recipe.levels.shape[-1] else None, int(recipe.member.sum(dim=1).max())
    others = random_features(recipe, sae, seed=0).features if sae else None
    for share in shares:
        part = recipe if share == 1 else keep_best(recipe, score, max(1, round(share * most)), "contrastive")
        best = whole if share == 1 else experiment.steered(part)
        random = None
        if sae:
            rows = torch.isin(recipe.features, part.features)
            random = experiment.steered(with_latents(part, sae, others[rows]))
        found.append(Part(len(part.features), best, random))
    return found


def paired_interval(difference: np.ndarray, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, over pictures, of a difference (n) between two edits of the same."""
    rows = np.random.default_rng(0).integers(len(difference), size=(draws, len(difference)))
    low, high = np.quantile(difference[rows].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- the checks ---


def not_checked(name: str, why: str) -> Check:
    return Check(name, {}, NOT_CHECKED, why)


def check_site(experiment: Experiment, sites: Sequence[str], per_class: int, whole: Outcome) -> Check:
    """Whether the class means of another of the sites turn clearly more pictures than those of the first, the recipe's.

    Where the recipe itself turns more than its site's class means, that counts for its site.
    """
    name, recipe, run = "right site", experiment.recipe, experiment.run
    if not sites:
        return not_checked(name, "No other sites were tried.")
    try:
        shown_classes(experiment.labels, recipe.attribute, recipe.classes)
    except DiffLensError as error:  # a model that draws one class alone has no class means
        return not_checked(name, str(error))
    done = run.done
    found = scan_sites(
        sites, run.sample, experiment.read, recipe.attribute, recipe.classes, len(experiment.unsteered), per_class,
        batch=run.batch, on_picture=lambda now, total: run.on_picture(done + now, done + total), parts=("whole",),
        unsteered=experiment.unsteered,
    )  # fmt: skip
    here, *others = found
    best = max(others, key=lambda row: row.success, default=here)
    reached = max(here.success, whole.success)
    n = per_class * sum(share is not None for share in here.per_class)
    shares = [(success * n + 1) / (n + 2) for success in (best.success, reached)]  # or none and all had no error
    gap = max(SITE_GAP, 2 * sum(share * (1 - share) / n for share in shares) ** 0.5)
    judged = partial(Check, name, {"sites": {row.site: row.success for row in found}, "recipe": whole.success})
    if best.success - reached > gap:
        return judged(
            BAD if reached < SOME else DOUBTFUL,
            f"Wrong site: the class means of {best.site} turn {best.success:.0%} of the pictures, at {here.site}, the "
            f"recipe's site, no more than {reached:.0%} turn.",
            f"Capture at {best.site}, train an SAE there and make a new recipe.",
        )
    if reached < SOME:
        return judged(
            DOUBTFUL,
            f"No site tried turns more than {max(best.success, reached):.0%} of the pictures by its class means.",
            "Look for a site with Site Scan: more pictures, other modules, a higher strength.",
        )
    return judged(
        GOOD, f"At {here.site} {reached:.0%} of the pictures turn, and no other site tried turns clearly more."
    )


def check_features(
    recipe: Recipe, sae: SparseAutoencoder | None, activations: Activations | None, labels: Tensor | None,
    on_step: Callable[[], None],
) -> Check:  # fmt: skip
    """Whether the SAE explains its site, and whether single latents tell the classes apart."""
    name = "features disentangled"
    if sae is None or activations is None or labels is None:
        return not_checked(name, "This needs the SAE, activations of its site, and the labels of their pictures.")
    quality = measure_sae(sae, hold_out(activations)[1])
    told = measure_separation(sae, activations, labels, recipe.attribute, recipe.classes, recipe.features, on_step)
    judged = partial(Check, name, asdict(quality) | {"auc": asdict(told)})
    words = (
        f"the SAE leaves {quality.fvu:.0%} of the variance unexplained with {quality.l0:.0f} active latents a position "
        f"and {quality.dead:.0%} dead ones; the best single latent tells a class with AUC {told.latents:.2f}, the best "
        f"raw channel with {told.raw:.2f}"
    )
    if quality.fvu > FVU_BAD:
        advice = "Train the SAE longer, with more latents or a larger k."
    elif told.latents < AUC_BAD and told.raw < AUC_BAD:
        advice = "The site itself does not tell the classes: check the labels, or capture at another site."
    else:
        advice = "Train the SAE with more latents and more pictures of the rare classes."
    if quality.fvu > FVU_BAD or told.latents < AUC_BAD:
        return judged(BAD, f"Features not disentangled: {words}.", advice)
    doubts = quality.fvu > FVU_DOUBTFUL, quality.dead > DEAD_DOUBTFUL, told.latents < AUC_DOUBTFUL
    if any(doubts) or told.latents < told.raw - AUC_LOSS:
        return judged(DOUBTFUL, f"Features not quite disentangled: {words}.", advice)
    return judged(GOOD, f"Single latents stand for the classes: {words}.")


def check_choice(doses: dict[float, Outcome], parts: Sequence[Part]) -> Check:
    """Whether the recipe's features turn pictures, and more than random ones do."""
    whole, last = doses[1.0], parts[-1]
    random = [part.random.success for part in parts if part.random]
    figures = {"features": [part.features for part in parts], "best": [part.best.success for part in parts]}
    judged = partial(Check, "right features", figures | {"random": random or None})
    strongest = max(DOSES, key=lambda dose: doses[dose].success)
    beside = f"as many random ones as strong {random[-1]:.0%}" if random else "random ones were not tried"
    if max(doses[dose].change for dose in DOSES) < UNSEEN:
        return judged(NOT_CHECKED, "The pictures do not change, so no feature can be told by them.")
    if doses[strongest].success < SOME:
        return judged(
            BAD,
            f"Wrong features: they change the pictures (by {whole.change:.3f} of 1), but at the best of the strengths "
            f"turn {doses[strongest].in_words}; {beside}.",
            "Choose features anew: Attribute Features with more pictures or another method, then Rank by Effect.",
        )
    if whole.success < SOME:
        return judged(
            GOOD, f"At {strongest:g} times the strength they turn {doses[strongest].in_words}: they carry the classes."
        )
    words = f"the recipe's {last.features} features turn {whole.success:.0%} of the pictures, {beside}"
    if random and random[-1] >= RANDOM_SHARE * whole.success:
        return judged(
            BAD,
            f"Wrong features: {words}; it is the size of the edit that turns them.",
            "Use a lower strength and look at the pictures; then choose features anew by Attribute Features.",
        )
    quarter = min(parts, key=lambda part: abs(part.features / last.features - 0.25))
    if quarter.best.success < QUARTER_SHARE * whole.success:
        return judged(
            DOUBTFUL,
            f"Many weak features: {words}, but the best {quarter.features} alone only {quarter.best.success:.0%}.",
            "Try Rank by Effect, which keeps those that count; or leave it, if the pictures look right.",
        )
    return judged(GOOD, f"Right features: {words}, the best {quarter.features} alone {quarter.best.success:.0%}.")


def check_dose(doses: dict[float, Outcome]) -> Check:
    """Whether more of the recipe means more of the class, and whether its strength is enough."""
    figures, whole, against = dose_figures(doses), doses[1.0], doses[-1.0]
    judged = partial(Check, "dose and effect", figures)
    low, high = figures["slope_interval"]
    slope = f"slope of the probability at the recipe's strength {figures['slope']:+.2f} ({low:+.2f} to {high:+.2f})"
    strongest = max(DOSES, key=lambda dose: doses[dose].success)
    turned, better = (
        f"turned are {whole.in_words}",
        f"at {strongest:g} times the strength {doses[strongest].success:.0%}",
    )
    if max(figures["change"]) < UNSEEN:
        return judged(
            BAD,
            f"Features do not move the output: at no strength does a picture change by more than "
            f"{max(figures['change']):.4f} of 1, which nobody sees.",
            "See whether the recipe is of this model, its start and end leave steps, and its levels differ by class.",
        )
    if against.success >= SOME and paired_interval(against.probability - whole.probability)[0] > 0:
        return judged(
            BAD,
            f"Steers backwards: {turned}, at the reversed strength {against.success:.0%}.",
            "Use a negative strength in Steer; in a model that predicts noise, better a site farther from its input "
            "and output, which echo the noisy picture.",
        )
    if whole.success >= WORKS:
        return judged(GOOD, f"Enough: {turned}, at twice the strength {doses[2.0].success:.0%}; {slope}.")
    if doses[strongest].success < SOME:
        return judged(
            BAD,
            f"Features do not move the output to the class: at the best of the strengths turn "
            f"{doses[strongest].in_words}; {slope}.",
            "Choose features anew: Attribute Features, then Rank by Effect.",
        )
    verdict = BAD if whole.success < SOME else DOUBTFUL
    if strongest > 1 and low > 0:
        return judged(verdict, f"Too weak: {turned}, {better}; {slope}.", f"Set strength to {strongest:g} in Steer.")
    if 0 < strongest < 1 and high < 0:
        return judged(verdict, f"Too strong: {turned}, {better}; {slope}.", f"Set strength to {strongest:g} in Steer.")
    return judged(
        verdict,
        f"Saturated: {turned}, {better}; {slope}.",
        "Give the recipe more features, or try another mode in Steer: more strength does not help.",
    )


def dose_figures(doses: dict[float, Outcome]) -> dict[str, Any]:
    """The dose-response as lists by rising strength, and the slope at the recipe's strength, with 95 % intervals.

    slope: the rise of the probability from half the strength to one and a half.
    """
    ordered, slope = sorted(doses), doses[1.5].probability - doses[0.5].probability
    return {
        "strength": ordered,
        "probability": [float(doses[dose].probability.mean()) for dose in ordered],
        "interval": [paired_interval(doses[dose].probability) for dose in ordered],
        "success": [doses[dose].success for dose in ordered],
        "per_class": [doses[dose].per_class for dose in ordered],
        "change": [doses[dose].change for dose in ordered],
        "slope": float(slope.mean()),
        "slope_interval": paired_interval(slope),
    }


def overall(checks: Sequence[Check]) -> str:
    """The evidence of the first check that fails; else of the first that is doubtful."""
    for verdict, opening in ((BAD, ""), (DOUBTFUL, "Nothing fails, but this is doubtful. ")):
        for check in checks:
            if check.verdict == verdict:
                return opening + check.evidence
    return "Nothing wrong found."


# --- words and pictures ---


def in_words(found: Diagnosis) -> str:
    """The verdict, then each check with its evidence and what to do next."""
    lines = [f"{found.attribute}: {found.verdict}", f"Steered: {found.pictures} pictures of other classes.", ""]
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
