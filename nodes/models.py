"""Nodes that load models which ComfyUI does not know by itself."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..difflens_core.networks import AUTO, BETAS, PREDICTIONS
from . import host
from .sockets import CATEGORY


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadModel",
            display_name="Load Unconditional Model",
            category=CATEGORY,
            description="Loads a diffusion model that draws without a prompt: the avatars, a guided-diffusion (ADM) or "
            "P2 checkpoint, or a diffusers UNet2DModel, with all that a KSampler needs.",
            search_aliases=["avatars", "unconditional", "pixel space", "ADM", "P2", "guided-diffusion", "DDPM"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_models(),
                    tooltip="A file in models/difflens_models, or a folder there with a config.json, as diffusers "
                    "writes it; or the avatars that come with the pack.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=[AUTO, *BETAS],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Noise schedule the model was trained with. auto: what its scheduler_config.json says, "
                    "else linear. Not used for the avatars.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=[AUTO, *PREDICTIONS],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What the model was trained to predict. auto: what its scheduler_config.json says, else "
                    "epsilon, the noise. Not used for the avatars.",
                ),
                io.Int.Input(
                    "class_label",
                    default=0,
                    min=0,
                    max=2**15,
                    optional=True,
                    advanced=True,
                    tooltip="Which class to draw, if the model was trained with classes (the report says).",
                ),
                io.Int.Input(
                    "heads",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Attention heads of an ADM checkpoint, which the file does not tell. 0: 64 channels each "
                    "if it changes size in its residual blocks, as P2 and nearly all of guided-diffusion; else 4.",
                ),
                io.Boolean.Input(
                    "new_attention_order",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For ADM checkpoints trained with use_new_attention_order (guided-diffusion: ImageNet 64).",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model. Sample it at cfg 1: it has no prompt to be guided by."),
                io.Conditioning.Output(
                    display_name="unconditional",
                    tooltip="A conditioning that says nothing (or only the class), for both positive and negative.",
                ),
                io.Vae.Output(tooltip="Pixel space: turns the model's latents, which are pixels, into images."),
                io.String.Output(
                    display_name="report", tooltip="What was found in the file, what was assumed, and the picture size."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return host.check_name(host.MODELS, model_name, [*host.list_models(), *host.list_prompted()])

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: Any) -> str:
        return host.name_state(host.MODELS, model_name)

    @classmethod
    @host.clear_errors
    def execute(
        cls, model_name: str, schedule: str = AUTO, prediction: str = AUTO, class_label: int = 0, heads: int = 0,
        new_attention_order: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        path = host.find_model(model_name)
        model, report, classes = host.load_model(path, schedule, prediction, heads, new_attention_order)
        conditioning = host.class_conditioning(class_label, classes)
        return io.NodeOutput(model, conditioning, host.pixel_space_vae(), report)


class LoadPromptedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadPromptedModel",
            display_name="Load Prompted Model",
            category=CATEGORY,
            description="Loads a small diffusion model that draws by prompt, such as the avatars at work, with all "
            "that CLIP Text Encode and a KSampler need.",
            search_aliases=["avatars", "prompt", "occupations"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_prompted(),
                    tooltip="A file in models/difflens_models, or the prompted avatars that come with the pack.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for Steer, Capture Activations or a KSampler; cfg 2 suits it."),
                io.Clip.Output(
                    tooltip="Reads prompts such as: portrait of a doctor. It knows a few words only, those of the "
                    "drawings it was trained on."
                ),
                io.Vae.Output(tooltip="Pixel space: turns the model's latents, which are pixels, into images."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return host.check_name(host.MODELS, model_name, host.list_files(host.MODELS))

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: Any) -> str:
        return host.name_state(host.MODELS, model_name)

    @classmethod
    @host.clear_errors
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(*host.load_prompted(host.find_file(host.MODELS, model_name)), host.pixel_space_vae())
