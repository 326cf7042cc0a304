"""Nodes for SamplerCustom: DDIM's noise levels, and the reference's way to sample."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..difflens_core.networks import SPACINGS
from . import host
from .sockets import CATEGORY


class DDIMSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensDDIMSigmas",
            display_name="DDIM Sigmas",
            category=CATEGORY,
            description="The noise levels of exactly those timesteps that DDIM takes in guided-diffusion or diffusers, "
            "for SamplerCustom.",
            search_aliases=["respacing", "ddim50", "timesteps"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample, for its own schedule."),
                io.Int.Input("steps", default=50, min=1, max=4000, tooltip="Steps of the sampling."),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default="ddim",
                    tooltip="ddim: every k-th timestep from 0, as guided-diffusion's ddim50 and the paper; leading, "
                    "trailing: as diffusers' timestep_spacing. trailing begins at the very last timestep.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustom, with sampler euler or Reference Sampler.")],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, model: Any, steps: int, spacing: str) -> io.NodeOutput:
        return io.NodeOutput(host.ddim_sigmas(model, steps, spacing))


class ReferenceSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensReferenceSampler",
            display_name="Reference Sampler (two passes)",
            category=CATEGORY,
            description="DDIM as the paper's reference code samples a steered model, for comparison: every step runs "
            "the model twice, steered and unsteered. Takes twice as long as a stock sampler.",
            search_aliases=["DDIM", "paper", "asymmetric"],
            inputs=[
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much new noise every step adds: 1 as in the reference code, 0 none (plain DDIM if "
                    "nothing is steered).",
                )
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom.")],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, eta: float) -> io.NodeOutput:
        return io.NodeOutput(host.reference_sampler(eta))
