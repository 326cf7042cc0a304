"""A classifier without training: CLIP and a prompt for every class."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..difflens_core.classifiers import ZeroShotClassifier, class_directions, parse_prompts
from ..difflens_core.files import DiffLensError
from . import host, host_classifiers
from .sockets import CATEGORY, Classifier

EXAMPLE = """young: a photo of a child | a photo of a young person
adult: a photo of an adult
old: a photo of an old person"""


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
        directions = class_directions([host_classifiers.text_embeddings(clip, texts) for texts in prompts.values()])
        embed = host_classifiers.image_embedder(clip_vision, directions.shape[1])
        return io.NodeOutput(ZeroShotClassifier({attribute.strip(): tuple(prompts)}, directions, embed))
