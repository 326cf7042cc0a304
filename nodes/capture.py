"""The nodes that sample pictures, keep what modules of the model put out meanwhile, and read that again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.activations import DTYPES, open_store
from ..difflens_core.classifiers import ImageClassifier, seen, seen_classes
from ..difflens_core.report import bar_chart
from . import host
from .classify import classes_of
from .inputs import guidance_inputs, sampling_inputs, schedule_inputs
from .sockets import CATEGORY, Activations, Classifier

MOST_TIMES = 8  # as many pictures as asked for are drawn at most for a rare class
TOO_FEW = "the rarest class is still too rare. Let the prompt name it, or take more pictures."


class CaptureActivations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensCapture",
            display_name="Capture Activations",
            category=CATEGORY,
            description="Samples pictures and keeps what one module of the model puts out at every step. "
            "The pictures are those that a KSampler draws from the same seed.",
            inputs=[
                *sampling_inputs(),
                io.Int.Input("pictures", default=256, min=1, max=65536, tooltip="How many pictures to draw in all."),
                *schedule_inputs(),
                io.String.Input(
                    "site",
                    default="middle_block",
                    tooltip="Name of the module to read, as the model's network or diffusers spells it. With the word "
                    "update behind it: what the module adds to its input. Several, with commas between them, go into "
                    "one store.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    optional=True,
                    tooltip="Steps before this share of the sampling are not kept.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    optional=True,
                    tooltip="Steps after this share of the sampling are not kept.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="float16",
                    advanced=True,
                    optional=True,
                    tooltip="How the numbers are kept. float16 is finer, bfloat16 holds larger numbers.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    optional=True,
                    tooltip="Name of a folder in models/difflens_activations, written while sampling goes on, so that "
                    "main memory does not limit the number of pictures. What a cancelled run has finished is kept: "
                    "queue again and it goes on. Empty: kept in main memory.",
                ),
                *guidance_inputs(),
                Classifier.Input(
                    "classifier",
                    optional=True,
                    tooltip="To draw on after `pictures` until the rarest class has enough, at most eight times as "
                    "many.",
                ),
                io.String.Input(
                    "attribute",
                    default="presentation",
                    optional=True,
                    tooltip="With a classifier: the attribute whose classes count.",
                ),
                io.Int.Input(
                    "per_class",
                    default=100,
                    min=1,
                    max=65536,
                    optional=True,
                    tooltip="With a classifier: how many pictures of every class are enough. A recipe knows a rare "
                    "class by these alone.",
                ),
                io.Int.Input(
                    "twins",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="So many pictures in turn start from the same noise. With a Prompt List in which so many "
                    "prompts in turn differ in one word (a male doctor, a female doctor), Attribute Features sees from "
                    "such twins what the word changes, wherever in the picture people are.",
                ),
            ],
            outputs=[
                Activations.Output(
                    display_name="activations",
                    tooltip="What the module (of several, the first) put out, for every step and picture.",
                ),
                io.Image.Output(display_name="images", tooltip="The pictures, in the same order."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, **_: Any) -> str:
        """A folder that was deleted is written again."""
        return str(host.times_missed(host.new_store(save_as))) if save_as and save_as.strip() else ""

    @classmethod
    @host.clear_errors
    def execute(
        cls, model: Any, positive: list, latent_image: dict, vae: Any, pictures: int, steps: int, sampler_name: str,
        scheduler: str, seed: int, site: str, start_percent: float = 0.0, end_percent: float = 1.0,
        dtype: str = "float16", save_as: str = "", negative: list | None = None, cfg: float = 1.0,
        classifier: ImageClassifier | None = None, attribute: str = "presentation", per_class: int = 100,
        twins: int = 1,
    ) -> io.NodeOutput:  # fmt: skip
        count = ClassCount(classifier, attribute, vae.decode) if classifier else None
        view = host.LiveView()

        def enough(latents: Tensor) -> bool:
            if count is None:
                return True
            rarest = count.add(latents)
            host.tell(host.node_id(), count.told)
            view.chart(count.chart, per_class)
            return rarest >= per_class

        store = host.capture(
            model, positive, latent_image, pictures, steps, sampler_name, scheduler, seed,
            tuple(name.strip() for name in site.split(",")), (start_percent, end_percent), dtype,
            host.new_store(save_as) if save_as.strip() else None, negative, cfg,
            most=MOST_TIMES * pictures if count else 0, enough=enough, view=view, twins=twins,
        )  # fmt: skip
        found = store.activations(), vae.decode(store.samples())
        if count is None:
            return io.NodeOutput(*found)
        text = count.told
        if min(count.pictures) < per_class:
            text = f"{text}: {TOO_FEW}"
            host.warn(cls, [text])
        else:
            host.tell(host.node_id(), text)
        return io.NodeOutput(*found, ui={"text": (text,)})


class ClassCount:
    """Counts the classes of an attribute that a classifier sees in pictures. decode: from latents to pictures."""

    def __init__(self, classifier: ImageClassifier, attribute: str, decode: Callable[[Tensor], Tensor]) -> None:
        self.classes = classes_of(classifier, attribute)
        self.classifier, self.attribute, self.decode = classifier, attribute, decode
        self.pictures = [0] * len(self.classes)

    def add(self, latents: Tensor) -> int:
        """How many pictures the rarest class has, with these."""
        shown = seen_classes(seen(self.classifier.classify(self.decode(latents)), self.attribute)).tolist()
        self.pictures = [known + shown.count(c) for c, known in enumerate(self.pictures)]
        return min(self.pictures)

    def chart(self, wanted: int) -> np.ndarray:
        """How many pictures each class has, and a line at how many are wanted."""
        bars = {name: {"pictures": float(count)} for name, count in zip(self.classes, self.pictures, strict=True)}
        return bar_chart(f"{self.attribute}: pictures of each class", bars, float(wanted))

    @property
    def told(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in zip(self.classes, self.pictures, strict=True))


class LoadActivations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadActivations",
            display_name="Load Activations",
            category=CATEGORY,
            description="Opens a folder that Capture Activations wrote. The numbers stay on the disk until they are "
            "used, so the folder may be larger than main memory.",
            inputs=[
                io.Combo.Input(
                    "store_name",
                    options=host.list_stores(),
                    tooltip="A folder in models/difflens_activations.",
                ),
                io.String.Input(
                    "site",
                    default="",
                    tooltip="Name of the module whose activations to take, if several were captured. Empty: the first.",
                ),
            ],
            outputs=[
                Activations.Output(
                    display_name="activations", tooltip="What the module put out, for every step and picture."
                ),
                io.Latent.Output(
                    display_name="samples",
                    tooltip="The finished latents, in the same order. VAE Decode makes the pictures of them.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, store_name: str | None = None) -> bool | str:
        return host.check_name(host.STORES, store_name, host.list_stores())

    @classmethod
    def fingerprint_inputs(cls, store_name: str | None = None, **_: Any) -> str:
        return host.name_state(host.STORES, store_name)

    @classmethod
    @host.clear_errors
    def execute(cls, store_name: str, site: str) -> io.NodeOutput:
        store = open_store(host.find_store(store_name))
        return io.NodeOutput(store.activations(site.strip()), {"samples": store.samples()})
