"""The node that tells why a recipe does or does not steer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from comfy_api.latest import io

from ..difflens_core.activations import Activations as CapturedActivations
from ..difflens_core.classifiers import ImageClassifier
from ..difflens_core.experiments import UNSTEERED, diagnose
from ..difflens_core.files import DiffLensError
from ..difflens_core.report import diagnosis_chart, diagnosis_text, line_chart
from ..difflens_core.sae import SparseAutoencoder
from ..difflens_core.steer import Recipe
from . import host
from .attribute import check_model_of, check_sae
from .classify import check_classes
from .explore import experiment_inputs
from .inputs import guidance_inputs, schedule_inputs
from .sockets import CATEGORY, SAE, Activations, Labels, LabelsSocket, RecipeSocket
from .steer import check_model


class Diagnose(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensDiagnose",
            display_name="Diagnose",
            category=CATEGORY,
            description="Tells why a recipe does or does not steer a model: the site, the features, the choice of "
            "features, or the strength.",
            search_aliases=["debug", "why", "failure", "ablation", "dose response"],
            inputs=[
                *experiment_inputs(),
                RecipeSocket.Input("recipe", tooltip="The recipe in question, as you steer by it."),
                io.Int.Input(
                    "pictures",
                    default=16,
                    min=2,
                    max=4096,
                    tooltip="Pictures steered to each class in every measurement. 16 and two classes draw 320 "
                    "pictures, with the SAE and other sites 592; every further class adds up to 232.",
                ),
                io.Boolean.Input(
                    "scan_sites",
                    default=True,
                    tooltip="Try a few other modules as well, with half as many pictures: is it the site?",
                ),
                *schedule_inputs(),
                SAE.Input(
                    "sae",
                    optional=True,
                    tooltip="The SAE that the recipe was made from: adds random features to compare with.",
                ),
                Activations.Input(
                    "activations",
                    optional=True,
                    tooltip="From Capture Activations at the recipe's site, best of pictures that the SAE was not "
                    "trained on: with SAE and labels it is checked whether the features are disentangled.",
                ),
                LabelsSocket.Input(
                    "labels",
                    optional=True,
                    tooltip="From Classify Images, of the recipe's attribute, on the images that the capture put out.",
                ),
                *guidance_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The verdict, and every check in words."),
                io.String.Output(display_name="json", tooltip="The same with all figures, for programs."),
                io.Image.Output(
                    display_name="chart",
                    tooltip="Success by number of features and by strength, the sites and the features, as far as "
                    "they were checked. Also drawn on the node.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, classifier: ImageClassifier, recipe: Recipe,
        pictures: int, scan_sites: bool, steps: int, sampler_name: str, scheduler: str, seed: int,
        sae: SparseAutoencoder | None = None, activations: CapturedActivations | None = None,
        labels: Labels | None = None, negative: list | None = None, cfg: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        check_classes(classifier, recipe)
        host.warn(cls, check_model(model, recipe))
        check_captured(model, recipe, sae, activations, labels)
        draw = host.drawer(
            model, positive, latent_image, vae, UNSTEERED * pictures, steps, sampler_name, scheduler, seed,
            cls.define_schema().display_name, negative, cfg,
        )  # fmt: skip
        others = [site for site in host.some_sites(model) if site != recipe.site] if scan_sites else []
        view, title = host.LiveView(), f"{recipe.attribute}: by strength"
        axes = "times the recipe's strength", "share that turns"
        found = diagnose(
            recipe, draw, classifier.classify, pictures, others, sae, activations, labels and labels.indices,
            len(latent_image["samples"]), view,
            lambda turned: view.chart(line_chart, title, {axes[1]: turned}, *axes, None, (0, 1)),
        )  # fmt: skip
        image, text = host.to_image(diagnosis_chart(found)), diagnosis_text(found)
        return host.drawn(cls, image, text, json.dumps(asdict(found), indent=2), image, text=text)


def check_captured(
    model: Any, recipe: Recipe, sae: SparseAutoencoder | None, activations: CapturedActivations | None,
    labels: Labels | None,
) -> None:  # fmt: skip
    """Raise `DiffLensError` if activations or labels are of something else than the recipe."""
    if activations and activations.site != recipe.site:
        raise DiffLensError(
            f"the activations are of {activations.site}, the recipe for {recipe.attribute} edits {recipe.site}. "
            "Capture at the recipe's site."
        )
    if activations:
        check_model_of(activations, model)
    if activations and sae:
        check_sae(sae, activations)
    if labels and (labels.attribute, labels.classes) != (recipe.attribute, recipe.classes):
        raise DiffLensError(
            f"the labels are of {labels.attribute} ({', '.join(labels.classes)}), the recipe is for "
            f"{recipe.attribute} ({', '.join(recipe.classes)}). Classify the captured images by the recipe's attribute."
        )
