"""The node that samples pictures and keeps what a module of the model puts out meanwhile."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import host
from .sockets import CATEGORY, Activations


class CaptureActivations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensCapture",
            display_name="Capture Activations",
            category=CATEGORY,
            description="Samples pictures (at cfg 1) and keeps what one module of the model puts out at every step. "
            "The pictures are those that a KSampler draws from the same seed.",
            inputs=[
                io.Model.Input("model", tooltip="The model to look into."),
                io.Conditioning.Input(
                    "positive", tooltip="What to draw: a prompt, or Load Unconditional Model's conditioning."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the size of the pictures. Its batch size tells how many are drawn at "
                    "once; it changes memory and speed, not the result.",
                ),
                io.Vae.Input("vae", tooltip="Turns the finished latents into images."),
                io.Int.Input("pictures", default=256, min=1, max=65536, tooltip="How many pictures to draw in all."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps; each is kept."),
                io.Combo.Input(
                    "sampler_name", options=host.SAMPLERS, default="euler", tooltip="One that keeps to the schedule."
                ),
                io.Combo.Input(
                    "scheduler", options=host.SCHEDULERS, default="simple", tooltip="How the noise levels are spaced."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the pictures' noise.",
                ),
                io.String.Input(
                    "site",
                    default="middle_block",
                    tooltip="Name of the module to read, as the model's network spells it.",
                ),
            ],
            outputs=[
                Activations.Output(
                    display_name="activations", tooltip="What the module put out, for every step and picture."
                ),
                io.Image.Output(display_name="images", tooltip="The pictures, in the same order."),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, pictures: int, steps: int, sampler_name: str,
        scheduler: str, seed: int, site: str,
    ) -> io.NodeOutput:  # fmt: skip
        activations, samples = host.capture(
            model, positive, latent_image, pictures, steps, sampler_name, scheduler, seed, site
        )
        return io.NodeOutput(activations, vae.decode(samples))
