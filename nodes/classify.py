"""Nodes that read attributes off pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.classifiers import (
    ImageClassifier,
    ZeroShotClassifier,
    class_directions,
    frames_of,
    join_readings,
    label_table,
    labelled,
    parse_prompts,
)
from ..difflens_core.files import DiffLensError
from ..difflens_core.steer import Recipe
from . import host
from .sockets import CATEGORY, Classifier, Labels, LabelsSocket

BATCH = 16


EXAMPLE = """young: a photo of a child | a photo of a young person
adult: a photo of an adult
old: a photo of an old person"""


class ClassifyImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensClassify",
            display_name="Classify Images",
            category=CATEGORY,
            description="Tells for every picture which class of an attribute it shows.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, such as Capture Activations puts out."),
                Classifier.Input("classifier", tooltip="From Load Attribute Classifier or Zero-shot Classifier."),
                io.String.Input("attribute", default="presentation", tooltip="One of the classifier's attributes."),
            ],
            outputs=[
                LabelsSocket.Output(display_name="labels", tooltip="The class of every picture."),
                io.String.Output(
                    display_name="csv",
                    tooltip="A line a picture: its class, the probability of each class, its other attributes.",
                ),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, images: Tensor, classifier: ImageClassifier, attribute: str) -> io.NodeOutput:
        classes = classes_of(classifier, attribute)
        report = host.progress_bar(len(images))
        read = classify(classifier, images, report)
        labels = Labels(
            attribute, classes, *labelled(read, classifier.attributes, attribute), frames_of(classifier, images), read
        )
        return io.NodeOutput(labels, label_table(read, classifier.attributes, attribute))


class ZeroShot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensZeroShot",
            display_name="Zero-shot Classifier",
            category=CATEGORY,
            description="Makes a classifier from CLIP and a prompt for every class. It tells which prompt a picture "
            "is most like.",
            search_aliases=["CLIP classifier", "prompt classifier"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text half of a CLIP, with its projection: Load CLIP, or SDXL's checkpoint."
                ),
                io.ClipVision.Input("clip_vision", tooltip="The picture half of the same CLIP, from Load CLIP Vision."),
                io.String.Input("attribute", default="age", tooltip="Name of what the classes tell."),
                io.String.Input(
                    "classes",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="A class a line, as name: prompt. Several prompts with | between them are averaged.",
                ),
            ],
            outputs=[
                Classifier.Output(
                    display_name="classifier", tooltip="The classifier, for every node that asks for one."
                )
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, clip: Any, clip_vision: Any, attribute: str, classes: str) -> io.NodeOutput:
        prompts = parse_prompts(classes)
        if not attribute.strip():
            raise DiffLensError("attribute is empty. Give a name to what the classes tell, such as age.")
        directions = class_directions([host.text_embeddings(clip, texts) for texts in prompts.values()])
        embed = host.image_embedder(clip_vision, directions.shape[1])
        return io.NodeOutput(ZeroShotClassifier({attribute.strip(): tuple(prompts)}, directions, embed))


def classes_of(classifier: ImageClassifier, attribute: str) -> tuple[str, ...]:
    """Classes of an attribute. Raises `DiffLensError` with those there are."""
    if attribute not in classifier.attributes:
        known = ", ".join(classifier.attributes)
        raise DiffLensError(f"the classifier knows no attribute {attribute!r}. It knows: {known}.")
    return classifier.attributes[attribute]


def check_classes(classifier: ImageClassifier, recipe: Recipe) -> None:
    """Raise `DiffLensError` unless the classifier knows the recipe's classes."""
    if classes_of(classifier, recipe.attribute) != recipe.classes:
        raise DiffLensError(
            f"the classifier's classes of {recipe.attribute} are not those of the recipe "
            f"({', '.join(recipe.classes)}). Use the classifier that the recipe's labels came from."
        )


def classify(classifier: ImageClassifier, images: Tensor, report: Any, done: int = 0) -> dict[str, Tensor]:
    """What the classifier reads off the pictures (n of everything), telling `report` of the pictures done."""
    parts = []
    for chunk in images.split(BATCH):
        parts.append(classifier.classify(chunk))
        done += len(chunk)
        report(done)
    return join_readings(parts)
