"""Nodes that find out how to meet a target: strengths, who is asked for what, what else moves."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.activations import Drawer
from ..difflens_core.classifiers import ImageClassifier, seen, seen_classes
from ..difflens_core.experiments import (
    CalibrationOptions,
    Doses,
    asked_shares,
    calibrate,
    check_calibration,
    cross_effects,
)
from ..difflens_core.files import DiffLensError, digest
from ..difflens_core.report import calibration_text, cross_chart, cross_table, dose_chart, mix_chart, weighing_text
from ..difflens_core.sae import SparseAutoencoder
from ..difflens_core.steer import Recipe, plan_in_words, planned_targets, weigh_latents
from ..difflens_core.targets import parse_target
from . import host
from .classify import check_classes, classify
from .explore import experiment_inputs
from .inputs import guidance_inputs, schedule_inputs, seed_input
from .sockets import CATEGORY, SAE, Classifier, RecipeSocket, TargetsSocket
from .steer import check_model


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensCalibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Finds the strengths with which a recipe meets a target mix, by drawing pictures: the "
            "weakest that show each class clearly, and the shares to ask for. Checks the result on fresh noises.",
            search_aliases=["tune", "dose response", "strength", "fairness", "debias"],
            inputs=[
                *experiment_inputs(),
                RecipeSocket.Input("recipe", tooltip="From Attribute Features or Load Recipe."),
                io.String.Input("target", default="uniform", tooltip="The mix to meet, written as in Steer."),
                io.Int.Input(
                    "budget",
                    default=1280,
                    min=80,
                    max=10**6,
                    tooltip="Pictures to draw at most. A fifth of them is what the mix is measured on: 1280 tell it to "
                    "about six points.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.02,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Distance from the target mix (FD) at which no better is sought; 0 is the target itself. "
                    "The target counts as reached where the distance is surely at most 0.05, or this if it is more.",
                ),
                io.Float.Input(
                    "clear",
                    default=0.999,
                    min=0.5,
                    max=1.0,
                    step=0.001,
                    tooltip="How sure the classifier must be, on average, of the class asked for; never surer than of "
                    "most unsteered pictures of the class. Lower: weaker, some pictures half-way, and less of the rest "
                    "changes.",
                ),
                io.Boolean.Input(
                    "only_where_needed",
                    default=False,
                    tooltip="Calibrate for Plan Targets, which leaves alone the pictures that already fit. Off: for "
                    "Steer alone.",
                ),
                *schedule_inputs(),
                *guidance_inputs(),
                SAE.Input(
                    "sae",
                    optional=True,
                    tooltip="The SAE that the recipe was made from, if you will steer with it, too. Recipes from Load "
                    "Feature Files need it in modes that read the features.",
                ),
                io.Boolean.Input(
                    "spare_others",
                    default=True,
                    optional=True,
                    tooltip="First weigh the features by what they do, so that whatever else the classifier reads "
                    "changes less. It differentiates through the model and takes the memory for that; a smaller batch "
                    "of the latent takes less.",
                ),
            ],
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="The calibrated recipe, for Steer or Save Recipe."),
                io.Image.Output(
                    display_name="chart", tooltip="Dose and response of every class, also drawn on the node."
                ),
                io.String.Output(display_name="text", tooltip="What was found, and whether the target was reached."),
                io.String.Output(display_name="json", tooltip="The whole record, which the recipe also keeps."),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, classifier: ImageClassifier, recipe: Recipe,
        target: str, budget: int, tolerance: float, clear: float, only_where_needed: bool, steps: int,
        sampler_name: str, scheduler: str, seed: int, negative: list | None = None, cfg: float = 1.0,
        sae: SparseAutoencoder | None = None, spare_others: bool = True,
    ) -> io.NodeOutput:  # fmt: skip
        host.warn(cls, check_model(model, recipe))
        check_classes(classifier, recipe)
        shares = parse_target(target, recipe.classes)
        options = CalibrationOptions(budget, tolerance, clear, only_where_needed, seed % 2**31)
        check_calibration(recipe, shares, options)
        sampler = host.HostSampler(
            model, positive, latent_image, steps, sampler_name, scheduler, seed, negative, cfg, vae,
            cls.define_schema().display_name,
        )  # fmt: skip
        noise = host.experiment_noise(sampler, 2 * options.pictures)
        draw, batch = Drawer(sampler, noise), len(latent_image["samples"])
        run = host.run_mark(model, positive, latent_image, negative, cfg, steps, sampler_name, scheduler, seed)
        grey = classifier.classify(torch.full((1, 64, 64, 3), 0.5))  # tells classifiers and face detectors apart
        reads = [grey[name].numpy().tobytes() for name in sorted(grey)]
        settings = f"{target}{options}{sae is not None}{spare_others}"
        mark = digest(run, host.recipe_mark(recipe), settings, f"{sorted(grey)}", *reads)
        folder = host.temporary_file(f"difflens_calibration_{mark}")
        weights = host.temporary_file(f"difflens_weights_{mark}.safetensors")
        weighing = options.weighed_by if spare_others else 0
        view, total = host.LiveView(), budget + 2 * weighing
        if weighing:
            recipe = weigh_latents(
                recipe, sampler, classifier, noise[:weighing], batch, lambda done: view(done, total), weights
            )

        mixes: dict[str, list[float]] = {}

        def on_batch(done: int, doses: Doses) -> None:
            view(2 * weighing + done, total)
            if any(doses.values()) and len(mixes) < 2:
                view.chart(dose_chart, recipe.attribute, doses)

        def on_mix(name: str, found: np.ndarray) -> None:
            mixes[name] = found.tolist()
            view.chart(mix_chart, recipe.attribute, recipe.classes, shares.tolist(), mixes)

        def read(images: Tensor) -> Tensor:
            return seen(classifier.classify(images), recipe.attribute)

        found = calibrate(recipe, draw, read, shares, options, batch, folder, on_batch, sae, on_mix)
        shutil.rmtree(folder, ignore_errors=True)
        weights.unlink(missing_ok=True)
        record = found.info["calibration"]
        image = host.to_image(dose_chart(recipe.attribute, record["doses"]))
        text = calibration_text(recipe.attribute, recipe.classes, record)
        if weighing:
            text += "\n" + weighing_text(found.info["weighed"])
        return host.drawn(cls, image, found, image, text, json.dumps(record, indent=2), text=text)


class PlanTargets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensPlan",
            display_name="Plan Targets",
            category=CATEGORY,
            description="Reads pictures of the model as it is and says which of them to change, and into what, so that "
            "the mix meets the target and as few as possible change. For one attribute or several at once.",
            search_aliases=["quota", "only where needed", "joint", "intersectional"],
            inputs=[
                Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier."),
                io.Image.Input(
                    "before",
                    tooltip="Pictures of the model as it is, from the seed and in the number that you will steer.",
                ),
                recipes_input("A recipe of every attribute; another socket appears when one is used."),
                io.String.Input(
                    "target",
                    default="uniform",
                    multiline=True,
                    tooltip="The mix, written as in Steer: one line for all recipes, or a line each in their order. "
                    "Several attributes are asked to be independent of one another.",
                ),
                seed_input("Which of pictures that are alike are changed."),
            ],
            outputs=[
                TargetsSocket.Output(
                    display_name="targets",
                    tooltip="For the Steer node of every recipe (input targets), and for Fairness Report.",
                ),
                io.String.Output(display_name="text", tooltip="How many pictures change, and how many must."),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, classifier: ImageClassifier, before: Tensor, recipes: dict[str, Recipe], target: str, seed: int
    ) -> io.NodeOutput:
        chosen = different_attributes(recipes)
        lines = target.strip().splitlines() or ["uniform"]
        if len(lines) not in (1, len(chosen)):
            raise DiffLensError(
                f"target has {len(lines)} lines for {len(chosen)} recipes. Write one line for all, or a line each."
            )
        lines *= len(chosen) // len(lines)
        for recipe in chosen:
            check_classes(classifier, recipe)
        read = classify(classifier, before, host.progress_bar(len(before)))
        own = {recipe.attribute: seen_classes(seen(read, recipe.attribute)).numpy() for recipe in chosen}
        classes = {recipe.attribute: recipe.classes for recipe in chosen}
        shares = {
            recipe.attribute: asked_shares(recipe, parse_target(line, recipe.classes), only_where_needed=True)
            for recipe, line in zip(chosen, lines, strict=True)
        }
        targets = planned_targets(own, classes, shares, seed)
        return io.NodeOutput(targets, plan_in_words(targets, own))


class CrossEffects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensCrossEffects",
            display_name="Cross Effects",
            category=CATEGORY,
            description="Steers by each recipe alone and by all together, and tells what happens to every attribute "
            "that the classifier knows: steer one, watch the others.",
            search_aliases=["side effects", "matrix", "entanglement"],
            inputs=[
                *experiment_inputs(),
                recipes_input("A recipe of every attribute; another socket appears when one is used."),
                io.Int.Input(
                    "pictures",
                    default=96,
                    min=4,
                    max=65536,
                    tooltip="Pictures to draw as they are, with each recipe, and with all together.",
                ),
                *schedule_inputs(),
                *guidance_inputs(),
                SAE.Input(
                    "sae",
                    optional=True,
                    tooltip="For recipes of which only their SAE tells where the features are active, such as those "
                    "from Load Feature Files.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="The matrix in words."),
                io.String.Output(display_name="json", tooltip="The same numbers, with intervals, for programs."),
                io.Image.Output(
                    display_name="chart",
                    tooltip="Share of pictures that change what was not asked for, also drawn on the node.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, classifier: ImageClassifier,
        recipes: dict[str, Recipe], pictures: int, steps: int, sampler_name: str, scheduler: str, seed: int,
        negative: list | None = None, cfg: float = 1.0, sae: SparseAutoencoder | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        chosen = different_attributes(recipes)
        host.warn(cls, [sentence for recipe in chosen for sentence in check_model(model, recipe)])
        for recipe in chosen:
            check_classes(classifier, recipe)
        draw = host.drawer(
            model, positive, latent_image, vae, pictures, steps, sampler_name, scheduler, seed,
            cls.define_schema().display_name, negative, cfg,
        )  # fmt: skip
        view = host.LiveView()
        found = cross_effects(
            chosen, draw, classifier.classify, classifier.attributes, pictures, len(latent_image["samples"]), view, sae,
            lambda rows: view.chart(cross_chart, rows),
        )  # fmt: skip
        image, text = host.to_image(cross_chart(found)), cross_table(found)
        return host.drawn(cls, image, text, json.dumps([asdict(row) for row in found], indent=2), image, text=text)


def recipes_input(tooltip: str) -> io.Input:
    recipe = RecipeSocket.Input("recipe", tooltip="From Load Recipe, Attribute Features or Calibrate.")
    template = io.Autogrow.TemplatePrefix(recipe, prefix="recipe", min=1, max=8)
    return io.Autogrow.Input("recipes", template=template, tooltip=tooltip)


def different_attributes(recipes: dict[str, Recipe]) -> list[Recipe]:
    """The connected recipes. Raises `DiffLensError` if two are about the same attribute."""
    chosen = [recipe for recipe in recipes.values() if recipe is not None]
    names = [recipe.attribute for recipe in chosen]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DiffLensError(f"two recipes are about {twice[0]}. Connect one recipe for each attribute.")
    return chosen
