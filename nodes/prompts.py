"""The node that writes several prompts at once."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .sockets import CATEGORY


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensPrompts",
            display_name="Prompt List",
            category=CATEGORY,
            description="Several prompts as one conditioning: the pictures of a batch get them in turn, in a KSampler "
            "and in all nodes that draw. So one capture, and one recipe, serve all of them.",
            search_aliases=["prompts", "batch prompt", "multiple prompts", "list"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of your model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a photo of the face of a doctor\na photo of the face of a nurse",
                    tooltip="A prompt a line. The first picture gets the first, and after the last it begins anew.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="For the positive of a KSampler, Capture Activations and the others."),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        prompts = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        return io.NodeOutput(host.encode_prompts(clip, prompts))
