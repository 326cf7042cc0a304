"""The node that steers a model by a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.experiments import asked_shares, plan_is_stale
from ..difflens_core.files import DiffLensError
from ..difflens_core.report import provenance
from ..difflens_core.sae import SparseAutoencoder
from ..difflens_core.steer import MODES, Recipe, at_dose, steerings, with_settings
from ..difflens_core.targets import Log, Targets, parse_target, targets_of
from . import host
from .inputs import seed_input
from .sockets import CATEGORY, SAE, RecipeSocket, TargetsSocket

AS_RECIPE = "from recipe"
HOLD = {"on": True, "off": False}
OFFERED = ("shift", "reach", "scale", "add own fixed", "ablate")  # the other modes serve old recipes and graphs
OTHER_WEIGHTS = "The recipe for {} was made on other weights{} than this model's; it may steer badly."
FITTING = " Made on this model are: {}."
STALE_PLAN = (
    "Plan Targets asks for shares of {} that make up for what the recipe misses as it was calibrated, but it is used "
    "with other settings here. Set them back, or calibrate it with these."
)


class Steer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensSteer",
            display_name="Steer",
            category=CATEGORY,
            description="Gives every picture of a run a class to show, in the shares you ask for, and steers the "
            "model there while it samples. Goes between the model and any sampler; several can be chained.",
            search_aliases=[
                "debias",
                "bias",
                "fairness",
                "fair",
                "diversity",
                "representation",
                "inclusive",
                "stereotype",
                "gender",
                "age",
                "race",
                "skin",
                "same face",
                "mix",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the recipe was made on."),
                RecipeSocket.Input("recipe", tooltip="From Load Recipe, Attribute Features or Load Feature Files."),
                io.String.Input(
                    "target",
                    default="uniform",
                    tooltip='The mix to draw: "uniform", the name of one class, shares in the order of the classes '
                    '("0.7, 0.3" or "70/30"), or named shares ("young: 1, senior: 3").',
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Multiplies the recipe's own strength. 0 leaves the pictures exactly as they are.",
                ),
                io.Combo.Input(
                    "mode",
                    options=[AS_RECIPE, *OFFERED],
                    default=AS_RECIPE,
                    tooltip="How the features are changed. shift: from the class a picture heads for to the asked one; "
                    "reach: to the asked class, by as much as is still missing; scale: multiply the asked class's "
                    "features; add own fixed: add the strength to them; ablate: take them away.",
                    advanced=True,
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Begin at this share of the sampling (narrows what the recipe says).",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="End at this share of the sampling (narrows what the recipe says).",
                ),
                seed_input(
                    "Which picture gets which class. A new seed deals anew; leave it to balance pictures over several "
                    "runs. Chained Steers are independent, whatever their seeds."
                ),
                io.Int.Input(
                    "first_image",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    advanced=True,
                    tooltip="Number of the batch's first picture, to go on where another batch ended.",
                ),
                io.Combo.Input(
                    "conditioning",
                    options=list(host.CONDITIONINGS),
                    optional=True,
                    default="positive",
                    advanced=True,
                    tooltip="Which half of the guidance to steer: what the positive conditioning draws, the negative, "
                    "or both. At cfg 1 there is only the positive.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture to steer: white fully, black not at all. One for all pictures or one "
                    "each.",
                ),
                SAE.Input(
                    "sae",
                    optional=True,
                    tooltip="The SAE that the recipe was made from: a feature then counts as active exactly where it "
                    "is among the SAE's k, not where the recipe's fitted threshold says so. Slower; matters to reach, "
                    "move, clamp, scale and ablate.",
                ),
                TargetsSocket.Input(
                    "targets",
                    optional=True,
                    tooltip="From Plan Targets: which class each picture is asked to show; pictures that fit as they "
                    "are stay exactly as they are. target and seed then have no say.",
                ),
                io.Int.Input(
                    "run",
                    default=-1,
                    min=-1,
                    max=2**24,
                    advanced=True,
                    optional=True,
                    tooltip="-1: pictures of a new seed go on with the mix where the last ones ended, so that single "
                    "pictures are as balanced as a batch; a seed drawn before gets what it had. 0 and more: the number "
                    "of the run, for the same pictures on every machine.",
                ),
                io.Combo.Input(
                    "hold",
                    options=[AS_RECIPE, *HOLD],
                    default=AS_RECIPE,
                    optional=True,
                    tooltip="Whether to draw every picture as it is first and hold on to that while steering: more of "
                    "everything else stays. on takes twice the time.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The steered model. The model that came in stays as it was."),
                TargetsSocket.Output(
                    display_name="targets",
                    tooltip="The class that each picture is asked to show, for Fairness Report.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, mode: str | None = None) -> bool | str:
        """Graphs of 0.4 may ask for modes that are no longer offered."""
        known = mode is None or mode in (AS_RECIPE, *MODES)
        return known or f"mode {mode!r} is unknown, expected one of {', '.join((AS_RECIPE, *OFFERED))}."

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, recipe: Recipe, target: str, strength: float, mode: str, start_percent: float,
        end_percent: float, seed: int, first_image: int, conditioning: str = "positive", mask: Tensor | None = None,
        sae: SparseAutoencoder | None = None, targets: tuple[Targets, ...] | None = None, run: int = -1,
        hold: str = AS_RECIPE,
    ) -> io.NodeOutput:  # fmt: skip
        return steer(
            cls, model, recipe, target, strength, mode, start_percent, end_percent, seed, first_image, conditioning,
            mask, sae, targets, run, hold,
        )  # fmt: skip


def steer(
    node: type[io.ComfyNode], model: Any, recipe: Recipe, target: str, strength: float = 1.0, mode: str = AS_RECIPE,
    start_percent: float = 0.0, end_percent: float = 1.0, seed: int = 0, first_image: int = 0,
    conditioning: str = "positive", mask: Tensor | None = None, sae: SparseAutoencoder | None = None,
    targets: tuple[Targets, ...] | None = None, run: int = -1, hold: str = AS_RECIPE,
) -> io.NodeOutput:  # fmt: skip
    """What `node` puts out: the steered model, and the targets. The rest are the inputs of Steer."""
    warnings, as_loaded = check_model(model, recipe), recipe
    if start_percent > end_percent:
        raise DiffLensError(f"start_percent ({start_percent:g}) lies after end_percent ({end_percent:g}).")
    recipe = with_settings(
        at_dose(recipe, strength),
        mode=recipe.mode if mode == AS_RECIPE else mode,
        start=max(recipe.start, start_percent),
        end=min(recipe.end, end_percent),
        hold=HOLD.get(hold, recipe.hold),
    )
    as_calibrated = mask is None and conditioning == "positive"
    if targets is None:
        shares = parse_target(target, recipe.classes)
        if as_calibrated:
            shares = asked_shares(recipe, shares)
        dealt = deal(model, recipe, tuple(shares.tolist()), seed, first_image)
    else:
        dealt = replace(targets_of(targets, recipe.attribute, recipe.classes), first_image=first_image, log=Log())
        run = max(run, 0)  # a plan is for the pictures that it was made from
        if plan_is_stale(as_loaded, recipe if as_calibrated else None, dealt.shares):
            warnings.append(STALE_PLAN.format(recipe.attribute))
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])  # some nodes put out a single mask without a batch
    mark = host.content_mark(host.recipe_mark(recipe), repr(dealt), conditioning, mask, sae is not None)
    for steering in steerings(recipe, dealt.of, sae, mask):
        model = host.apply_site(
            model, steering.site, steering, node.define_schema().display_name, conditioning,
            span=(recipe.start, recipe.end), run=run, deal=repr(dealt), mark=mark, log=dealt.log,
            node_id=host.node_id(), hold=steering.holds,
        )  # fmt: skip
    dealt.log.warned = tuple(warnings)
    host.warn(node, warnings)
    return io.NodeOutput(host.with_deal(model, dealt), (dealt,))


def deal(model: Any, recipe: Recipe, shares: tuple[float, ...], seed: int, first_image: int) -> Targets:
    """The deal of the recipe's classes: independent of earlier Steers, and the same as an equal one's."""
    last = earlier = host.dealt(model)
    while earlier:
        if (earlier.attribute, earlier.classes, earlier.shares, earlier.seed) == (
            recipe.attribute, recipe.classes, shares, seed,
        ):  # fmt: skip
            return replace(earlier, first_image=first_image, log=Log())
        earlier = earlier.beside
    return Targets(recipe.attribute, recipe.classes, shares, seed, first_image, last)


def check_model(model: Any, recipe: Recipe) -> list[str]:
    """A warning if the recipe was made on other weights.

    Raises `DiffLensError` if it cannot fit the model.
    """
    for part in recipe.parts:
        width = host.site_width(model, part.site)
        if width not in (None, part.channels):
            raise DiffLensError(
                f"the recipe for {part.attribute} was made on {part.site} with {part.channels} channels, this model's "
                f"has {width}. Use a recipe made on this model."
            )
    if host.belongs(recipe.model, model):
        return []
    fitting, named = ", ".join(host.recipes_of(model)), provenance({"info": recipe.info}).get("model_name")
    other = OTHER_WEIGHTS.format(recipe.attribute, f" ({named})" if named else "")
    return [other + (FITTING.format(fitting) if fitting else "")]
