"""The four checks of a diagnosis, each with its verdict, evidence and advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..activations import Activations
from ..files import DiffLensError
from ..locate import measure_separation
from ..sae import SparseAutoencoder, hold_out, measure_sae
from ..steer import Recipe
from .draw import shown_classes
from .outcomes import DOSES, Experiment, Outcome, Part, mean_seen, paired_interval
from .scan import scan_sites

GOOD, DOUBTFUL, BAD, NOT_CHECKED = "good", "doubtful", "bad", "not checked"

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
            GOOD,
            f"At {strongest:g} times the strength they turn {doses[strongest].in_words}: they carry the classes.",
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
        "probability": [mean_seen(doses[dose].probability) for dose in ordered],
        "interval": [paired_interval(doses[dose].probability) for dose in ordered],
        "success": [doses[dose].success for dose in ordered],
        "per_class": [doses[dose].per_class for dose in ordered],
        "change": [doses[dose].change for dose in ordered],
        "no_face": [doses[dose].no_face for dose in ordered],
        "slope": mean_seen(slope),
        "slope_interval": paired_interval(slope),
    }
