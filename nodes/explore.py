"""Nodes that find out by sampling: which sites control an attribute, and which features do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from comfy_api.latest import io

from ..difflens_core.classifiers import ImageClassifier, seen
from ..difflens_core.experiments import EFFECTS, causal_effect, keep_effective, scan_sites
from ..difflens_core.report import CHARTED, effect_chart, effect_table, scan_chart, scan_table
from ..difflens_core.steer import Recipe
from . import host
from .classify import check_classes, classes_of
from .inputs import guidance_inputs, sampling_inputs, schedule_inputs
from .sockets import CATEGORY, Classifier, RecipeSocket
from .steer import check_model

TOGETHER = 3  # sites that are steered together at most, if one does not suffice


def experiment_inputs() -> list[io.Input]:
    """What is sampled, and what reads the pictures."""
    classifier = Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier.")
    return [*sampling_inputs(), classifier]


class SiteScan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensSiteScan",
            display_name="Site Scan",
            category=CATEGORY,
            description="Tells which modules of a model control an attribute, and in which part of the sampling, "
            "before any SAE is trained.",
            search_aliases=["where", "layer search", "mean difference"],
            inputs=[
                *experiment_inputs(),
                io.String.Input("attribute", default="presentation", tooltip="One of the classifier's attributes."),
                io.String.Input(
                    "sites",
                    default="",
                    multiline=True,
                    tooltip="Names of the modules to try, divided by commas or lines. Empty: the middle block and a "
                    "few before and after it.",
                ),
                io.Int.Input(
                    "pictures",
                    default=128,
                    min=4,
                    max=65536,
                    tooltip="Pictures to take the class means from; all are drawn twice. More make rare classes clear.",
                ),
                io.Int.Input(
                    "per_class",
                    default=8,
                    min=1,
                    max=4096,
                    tooltip="Pictures to steer to each class, for every site and five parts of the sampling.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=10.0, step=0.1, tooltip="Times the difference of the means."
                ),
                *schedule_inputs(),
                *guidance_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="A line for every site and part of the sampling."),
                io.String.Output(display_name="json", tooltip="The same numbers for programs."),
                io.Image.Output(
                    display_name="chart",
                    tooltip="Share of the steered pictures that show the class asked for, also drawn on the node.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, classifier: ImageClassifier, attribute: str,
        sites: str, pictures: int, per_class: int, strength: float, steps: int, sampler_name: str, scheduler: str,
        seed: int, negative: list | None = None, cfg: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        classes = classes_of(classifier, attribute)
        names = [name.strip() for name in sites.replace(",", "\n").splitlines()]
        names = [*dict.fromkeys(filter(None, names))] or host.some_sites(model)
        for name in names:
            host.site_width(model, name)
        draw = host.drawer(
            model, positive, latent_image, vae, pictures, steps, sampler_name, scheduler, seed,
            cls.define_schema().display_name, negative, cfg,
        )  # fmt: skip
        view = host.LiveView()
        found = scan_sites(
            names, draw, classifier.classify, attribute, classes, pictures, per_class, strength,
            len(latent_image["samples"]), view, together=TOGETHER,
            on_found=lambda rows: view.chart(scan_chart, rows, attribute),
        )  # fmt: skip
        image = host.to_image(scan_chart(found, attribute))
        text = scan_table(found, attribute, classes)
        numbers = {"attribute": attribute, "classes": classes, "rows": [asdict(row) for row in found]}
        return host.drawn(cls, image, text, json.dumps(numbers, indent=2), image, text=text)


class RankByEffect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensRankByEffect",
            display_name="Rank by Effect",
            category=CATEGORY,
            description="Changes every feature of a recipe alone while pictures are sampled, and keeps those that "
            "change the class most.",
            search_aliases=["causal effect", "ablation"],
            inputs=[
                *experiment_inputs(),
                RecipeSocket.Input("recipe", tooltip="A recipe of this model with a short list of features."),
                io.Combo.Input(
                    "change",
                    options=list(EFFECTS),
                    default=EFFECTS[0],
                    tooltip="amplify: add what the class that uses the feature most has more of than the others. "
                    "ablate: take the feature away.",
                ),
                io.Float.Input("strength", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="How much to amplify."),
                io.Int.Input(
                    "pictures",
                    default=8,
                    min=2,
                    max=4096,
                    tooltip="Pictures for every feature: a recipe of 100 features and 8 pictures draws 808.",
                ),
                io.Int.Input(
                    "features_per_class", default=30, min=1, max=4096, tooltip="Best features of each class to keep."
                ),
                *schedule_inputs(),
                *guidance_inputs(),
            ],
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="The recipe with the features that are kept."),
                io.Image.Output(
                    display_name="chart",
                    tooltip=f"The {CHARTED} strongest of each class with 95 % intervals, also drawn on the node.",
                ),
                io.String.Output(
                    display_name="table", tooltip="Every feature's effect on each class, and the class it stands for."
                ),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, classifier: ImageClassifier, recipe: Recipe,
        change: str, strength: float, pictures: int, features_per_class: int, steps: int, sampler_name: str,
        scheduler: str, seed: int, negative: list | None = None, cfg: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        host.warn(cls, check_model(model, recipe))
        check_classes(classifier, recipe)
        draw = host.drawer(
            model, positive, latent_image, vae, pictures, steps, sampler_name, scheduler, seed,
            cls.define_schema().display_name, negative, cfg,
        )  # fmt: skip
        view = host.LiveView()
        effects = causal_effect(
            recipe, draw, lambda images: seen(classifier.classify(images), recipe.attribute), pictures, change,
            strength, len(latent_image["samples"]), view, lambda found: view.chart(effect_chart, found, recipe),
        )  # fmt: skip
        image = host.to_image(effect_chart(effects, recipe))
        text = effect_table(effects, recipe)
        return host.drawn(cls, image, keep_effective(recipe, effects, features_per_class), image, text, text=text)
