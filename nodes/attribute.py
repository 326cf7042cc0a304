"""Nodes that find the features of an attribute."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..difflens_core.activations import ROWS
from ..difflens_core.activations import Activations as CapturedActivations
from ..difflens_core.classifiers import faces_missing
from ..difflens_core.files import DiffLensError
from ..difflens_core.locate import (
    METHODS,
    LabelledPictures,
    Probes,
    attribute_features,
    balancing_weights,
    check_labels,
    in_frames,
    train_probes,
)
from ..difflens_core.report import CHARTED, line_chart, ranking_chart, ranking_table
from ..difflens_core.sae import SparseAutoencoder
from ..difflens_core.steer import TWIN, Recipe, as_stored, build_recipe, joined
from . import host
from .sockets import CATEGORY, SAE, Activations, Labels, LabelsSocket, ProbesSocket, RecipeSocket


class TrainProbes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensTrainProbes",
            display_name="Train Probes",
            category=CATEGORY,
            description="Trains, for every sampling step, a linear probe that tells from the model's inside which "
            "class the picture will show.",
            inputs=[
                Activations.Input("activations", tooltip="From Capture Activations."),
                SAE.Input("sae", tooltip="An SAE of the same model and site."),
                LabelsSocket.Input("labels", tooltip="From Classify Images, on the images that the capture put out."),
            ],
            outputs=[
                ProbesSocket.Output(display_name="probes", tooltip="One probe a step, for Attribute Features."),
                io.Image.Output(
                    display_name="accuracy",
                    tooltip="Balanced accuracy of every step's probe on held-out pictures: how early the class is "
                    "decided. Also drawn on the node.",
                ),
                io.String.Output(display_name="summary", tooltip="The accuracy in words."),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, activations: CapturedActivations, sae: SparseAutoencoder, labels: Labels) -> io.NodeOutput:
        check_sae(sae, activations)
        activations = in_frames(activations, labels.frames, sae)
        report = host.progress_bar(len(activations.progress))
        probes = train_probes(activations, sae, labels.indices, labels.attribute, labels.classes, on_step=report)
        points = list(zip(activations.progress.tolist(), probes.accuracy.tolist(), strict=True))
        image = host.to_image(
            line_chart(
                f"{labels.attribute}: what the probes know", {"accuracy": points}, "progress of sampling",
                "balanced accuracy on held-out pictures",
            )
        )  # fmt: skip
        best = max(points, key=lambda point: point[1])
        text = (
            f"{labels.attribute}: balanced accuracy {points[0][1]:.1%} at the first step, {points[-1][1]:.1%} at the "
            f"last, best {best[1]:.1%} at {best[0]:.0%} of the sampling (chance {1 / len(labels.classes):.1%})"
        )
        if missing := faces_missing(labels.indices):
            text += f". {missing}"
        return host.drawn(cls, image, probes, image, text, text=text)


class AttributeFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensAttribute",
            display_name="Attribute Features",
            category=CATEGORY,
            description="Ranks the SAE's latents by how much they carry each class of an attribute, and makes a "
            "recipe of the best.",
            search_aliases=["integrated gradients", "bias features", "interpretability", "stereotype"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the activations come from; its mark goes into the "
                               "recipe."),
                Activations.Input("activations", tooltip="From Capture Activations."),
                SAE.Input("sae", tooltip="An SAE of the same model and site."),
                ProbesSocket.Input("probes", tooltip="From Train Probes."),
                LabelsSocket.Input("labels", tooltip="The labels that the probes were trained on. By the other "
                                  "attributes that the classifier reads, the recipe spares what else a picture shows."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="class mean difference",
                    tooltip="class mean difference: how much of the difference between the class's pictures and the "
                    "others' a latent writes, without the probe. contrastive: how much more a class uses it, and how "
                    "much that moves the probe. integrated gradients: what it adds to the probe's certainty. "
                    "activation x gradient: its pull on the probe where the picture is.",
                ),
                io.Int.Input(
                    "features_per_class", default=120, min=1, max=4096, tooltip="Best latents of each class to keep; "
                    "those that do not speak for it are left out."
                ),
                Activations.Input(
                    "baseline",
                    optional=True,
                    tooltip="For integrated gradients: where the path begins, instead of at no latents. Capture it "
                    "with the same settings and seed under another prompt, such as that of another class.",
                ),
                RecipeSocket.Input(
                    "join",
                    optional=True,
                    tooltip="A recipe for the same attribute at other sites of this model, from another Attribute "
                    "Features: all their sites are then steered together.",
                ),
                Activations.Input(
                    "other_size",
                    optional=True,
                    tooltip="Twins of another size of picture, from Capture Activations of the same model and site, to "
                    "learn from as well. In larger pictures there are larger figures.",
                ),
                LabelsSocket.Input(
                    "other_labels", optional=True, tooltip="From Classify Images, on the pictures of the other size."
                ),
            ],
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="The best latents with all that Steer needs."),
                io.Image.Output(
                    display_name="chart",
                    tooltip=f"How much more active the {CHARTED} best are in each class, also drawn on the node.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="The latents of each class: score, how much more active they are, and how sure that is.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, activations: CapturedActivations, sae: SparseAutoencoder, probes: Probes, labels: Labels,
        method: str, features_per_class: int, baseline: CapturedActivations | None = None,
        join: Recipe | None = None, other_size: CapturedActivations | None = None, other_labels: Labels | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        check_sae(sae, activations)
        if (labels.attribute, labels.classes) != (probes.attribute, probes.classes):
            raise DiffLensError(
                f"the labels are of {labels.attribute}, the probes were trained on {probes.attribute}. "
                "Connect the labels that Train Probes got."
            )
        host.site_width(model, activations.site)
        check_model_of(activations, model)
        more = of_other_size(activations, labels, other_size, other_labels)
        activations = in_frames(activations, labels.frames, sae)
        baseline = baseline and in_frames(baseline, labels.frames, sae)
        steps = len(activations.progress)
        report = host.progress_bar(2 * steps)
        weights = balancing_weights(labels.indices, [indices for _, indices in labels.others.values()])
        sae = sae.to(host.training_device(locating_bytes(sae), SMALLER_SAE))
        found = attribute_features(
            activations, sae, probes, labels.indices, method, weights, baseline=baseline, on_step=report
        )
        recipe = build_recipe(
            found, sae, probes, activations, labels.indices, labels.others, features_per_class,
            host.model_fingerprint(model), lambda step: report(steps + step), labels.readings, more,
        )  # fmt: skip
        recipe = as_stored(joined(join, recipe) if join else recipe)  # draws the same once it is saved and loaded
        image = host.to_image(ranking_chart(found))
        text = ranking_table(found, features_per_class)
        if recipe.mode == TWIN:
            captures = [LabelledPictures(activations, labels.indices, labels.others), *more]
            text = f"{TWINS.format(sum(len(of.pairs[0]) for of in captures))}\n\n{text}"
        if recipe.frame:
            text = f"{FOLLOWS}\n\n{text}"
        if join:
            text = f"The recipe steers at {', '.join(recipe.sites)} together.\n\n{text}"
        return host.drawn(cls, image, recipe, image, text, text=text)


def of_other_size(
    activations: CapturedActivations, labels: Labels, other: CapturedActivations | None, other_labels: Labels | None
) -> list[LabelledPictures]:
    """Twins of another size of picture, if there are any. Raises `DiffLensError` if they are not of the same kind."""
    if other is None or other_labels is None:
        if other is not other_labels:
            raise DiffLensError(
                "other_size and other_labels belong together: connect both, or neither. The labels come from Classify "
                "Images, on the pictures of the other size."
            )
        return []
    if activations.twins < 2 or other.twins < 2:
        raise DiffLensError(
            "a second size serves only where both captures hold twins. Set twins in both Capture Activations, or "
            "disconnect other_size."
        )
    kind = (activations.site, activations.width, activations.model)
    if kind != (other.site, other.width, other.model):
        raise DiffLensError(
            f"other_size is of {other.site} ({other.width} wide, mark {other.model}), the activations are of "
            f"{kind[0]} ({kind[1]} wide, mark {kind[2]}). Capture both with one model, at one site."
        )
    if (labels.attribute, labels.classes) != (other_labels.attribute, other_labels.classes):
        raise DiffLensError(
            f"other_labels are of {other_labels.attribute}, the labels of {labels.attribute}. Classify both by one "
            "attribute."
        )
    check_labels(other_labels.indices, other_labels.classes, other.pictures, other_labels.attribute)
    return [LabelledPictures(other, other_labels.indices, other_labels.others, other_labels.readings)]


TWINS = (
    "Learned from {} pairs of pictures of the same noise that differ in their class alone: the recipe sees in each "
    "picture what to change where, at any size. It draws every picture twice."
)
FOLLOWS = (
    "The subjects are at different places, or of different sizes: the recipe finds the subject of each picture and "
    "steers there, at any size of picture."
)


SMALLER_SAE = "Close other programs, or use an SAE of fewer latents."


def locating_bytes(sae: SparseAutoencoder) -> int:
    """What an SAE takes where it encodes a batch of rows, with room for copies."""
    return 4 * (2 * sae.encoder.numel() + 3 * ROWS * sae.latents)


def check_sae(sae: SparseAutoencoder, activations: CapturedActivations) -> None:
    """Raise `DiffLensError` if the SAE was trained on another site or width than the activations'."""
    if (sae.site, sae.channels) != (activations.site, activations.width):
        raise DiffLensError(
            f"the SAE was trained on {sae.site} ({sae.channels} wide), the activations are of {activations.site} "
            f"({activations.width} wide). Use an SAE of the same model, and capture at its site under the same name."
        )


def check_model_of(activations: CapturedActivations, model: Any) -> None:
    """Raise `DiffLensError` if the activations were captured on other weights than the model's."""
    if not host.belongs(activations.model, model):
        raise DiffLensError(
            f"the activations were captured on another model (mark {activations.model}, this one has "
            f"{host.model_fingerprint(model)}). Connect the model that Capture Activations got."
        )
