"""The node that trains a sparse autoencoder."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.activations import Activations as CapturedActivations
from ..difflens_core.report import loss_chart
from ..difflens_core.sae import (
    ACTIVATIONS,
    PRECISIONS,
    VALIDATION_PICTURES,
    Quality,
    TrainingOptions,
    hold_out,
    measure_sae,
    save_sae,
    train_sae,
    training_bytes,
)
from . import host
from .inputs import seed_input
from .sockets import CATEGORY, SAE, Activations

CHART_EVERY = 50  # steps
SMALLER = "Take fewer latents, or a smaller batch_size."


class TrainSAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensTrainSAE",
            display_name="Train SAE",
            category=CATEGORY,
            description="Trains a sparse autoencoder that explains every activation by a few active latents. "
            "Cancel keeps the work: the same queue goes on from there.",
            search_aliases=["sparse autoencoder"],
            inputs=[
                Activations.Input(
                    "activations",
                    tooltip="From Capture Activations; more pictures make a better SAE. The last eighth of the "
                    "pictures is kept out of training, to measure the result.",
                ),
                io.Int.Input(
                    "latents", default=1024, min=2, max=65536, tooltip="Size of the dictionary: how many latents."
                ),
                io.Int.Input("k", default=32, min=1, max=1024, tooltip="Active latents at a position."),
                io.Int.Input("steps", default=1500, min=1, max=1000000, tooltip="Training steps."),
                io.Int.Input("batch_size", default=2048, min=1, max=65536, tooltip="Positions in a training step."),
                io.Float.Input(
                    "learning_rate", default=0.001, min=1e-6, max=1.0, step=1e-5, tooltip="Peak learning rate of Adam."
                ),
                seed_input("Seed of the first weights and of the batches."),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="Name of a file in models/difflens_saes; a file of that name is replaced. "
                    "Empty: not saved.",
                ),
                io.Combo.Input(
                    "activation",
                    options=list(ACTIVATIONS),
                    optional=True,
                    default="topk",
                    advanced=True,
                    tooltip="topk: k active latents at every position. batchtopk: k on average, more where there is "
                    "more to explain.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    optional=True,
                    default="fp32",
                    advanced=True,
                    tooltip="bf16 finds the active latents in half precision, which is faster on processors that "
                    "support it; their values stay exact.",
                ),
            ],
            outputs=[
                SAE.Output(display_name="sae", tooltip="The trained SAE."),
                io.Image.Output(display_name="loss", tooltip="The loss curve, also drawn on the node."),
                io.String.Output(
                    display_name="quality",
                    tooltip="On the pictures kept out of training: FVU (share of the variance not explained, 0 is "
                    "best), L0 (active latents at a position), dead (share of latents that never fired).",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, **_: Any) -> str:
        """A file that was deleted is written again."""
        return str(host.times_missed(host.new_file(host.SAES, save_as)[0])) if save_as and save_as.strip() else ""

    @classmethod
    @host.clear_errors
    def execute(
        cls, activations: CapturedActivations, latents: int, k: int, steps: int, batch_size: int, learning_rate: float,
        seed: int, save_as: str, activation: str = "topk", precision: str = "fp32",
    ) -> io.NodeOutput:  # fmt: skip
        train, held_out = hold_out(activations)
        path = host.new_file(host.SAES, save_as)[0] if save_as.strip() else None
        options = TrainingOptions(latents, k, steps, batch_size, learning_rate, activation, precision, seed=seed)
        checkpoint = host.temporary_file(f"difflens_sae_{host.training_mark(options, activations)}.pt")
        view = host.LiveView()
        curves: dict[str, list[tuple[float, float]]] = {"training": [], "held out": [], "dead latents": []}

        def on_step(step: int, loss: Tensor, seen: Quality | None) -> None:
            charted = step % CHART_EVERY == 0 or seen is not None
            if charted or step in (1, steps):
                curves["training"].append((step, float(loss)))
            if seen:
                curves["held out"].append((step, seen.fvu))
                curves["dead latents"].append((step, seen.dead))
            view(step, steps)
            if charted:
                view.chart(loss_chart, curves)

        with host.training():
            some = held_out.part(0, VALIDATION_PICTURES)
            device = host.training_device(training_bytes(options, activations.width), SMALLER)
            sae = train_sae(train, options, on_step, checkpoint, some, device)
        quality = measure_sae(sae.to(device), held_out)
        sae = replace(sae, info={**sae.info, "held_out": asdict(quality)})
        if path:
            save_sae(path, sae)
        checkpoint.unlink(missing_ok=True)
        text = (
            f"FVU {quality.fvu:.3f}, L0 {quality.l0:.1f}, dead latents {quality.dead:.1%} "
            f"(on {held_out.pictures} of {activations.pictures} pictures, kept out of training)"
        )
        image = host.to_image(loss_chart(curves))
        return host.drawn(cls, image, sae, image, text, text=text)
