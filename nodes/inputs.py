"""Inputs that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io

from . import host


def seed_input(tooltip: str, largest: int = 2**31 - 1) -> io.Input:
    """A seed that stays as it is from run to run, unlike ComfyUI's own ones: results can be cached and compared."""
    return io.Int.Input(
        "seed", default=0, min=0, max=largest, control_after_generate=io.ControlAfterGenerate.fixed, tooltip=tooltip
    )


def sampling_inputs() -> list[io.Input]:
    """What is sampled."""
    return [
        io.Model.Input("model", tooltip="The model to look into. It stays as it was."),
        io.Conditioning.Input(
            "positive", tooltip="What to draw: a prompt, or Load Unconditional Model's conditioning."
        ),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent of the size of the pictures. Its batch size tells how many are drawn at once; it "
            "changes memory and speed, not the result.",
        ),
        io.Vae.Input("vae", tooltip="Turns the finished latents into images."),
    ]


def schedule_inputs() -> list[io.Input]:
    """How it is sampled."""
    return [
        io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps."),
        io.Combo.Input(
            "sampler_name",
            options=host.SAMPLERS,
            default="euler",
            tooltip="As for KSampler. To capture, one that keeps to the schedule.",
        ),
        io.Combo.Input("scheduler", options=host.SCHEDULERS, default="simple", tooltip="As for KSampler."),
        seed_input("Seed of the pictures' noise.", 2**64 - 1),
    ]


def guidance_inputs() -> list[io.Input]:
    """Guidance away from a negative conditioning. They came later, so they are the last inputs of every node."""
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What to guide away from, as you will sample. What it draws is neither read nor changed.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            tooltip="Strength of the guidance, as you will sample; 1 is none, and needs no negative.",
        ),
    ]
