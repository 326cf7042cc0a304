"""Sampling for nodes that draw pictures of their own: capture, and experiments."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import latent_preview
import psutil
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflens_core.activations import (
    Drawer,
    Edit,
    Kept,
    Leaf,
    OnPrediction,
    Store,
    differentiable,
    innermost,
    noise_batches,
)
from ...difflens_core.activations import capture as capture_with
from ...difflens_core.files import DiffLensError, digest
from ...difflens_core.steer import Steering
from .edits import Settings, apply_site, edit_site, follows_first
from .marks import belongs, conditioning_content, content, model_fingerprint, patches_mark
from .progress import LiveView, log, node_id, tell
from .prompts import of_pictures
from .runs import progress_of

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS
ADD_NONE = ("res_multistep", "res_multistep_cfg_pp")  # they could add noise, and do not
WORTH_TELLING = 10**8  # bytes of a capture
SAME = 2e-6  # difference of progress, which is rounded, up to which two noise levels are one


def empty_latents(model: ModelPatcher, positive: list, latent: dict) -> Tensor:
    """The latents that a sampler starts from, with the channels of the model. Refuses empty inputs."""
    if not positive:
        raise DiffLensError("the positive conditioning is empty. Connect one, such as Load Unconditional Model's.")
    if len(latent["samples"]) == 0:
        raise DiffLensError("the latent image holds no picture. Set the batch size of Empty Latent Image to 1 or more.")
    keys = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *(latent.get(key) for key in keys))


def check_guidance(negative: list | None, cfg: float) -> None:
    """Raises `DiffLensError` if there is nothing to guide away from."""
    if cfg != 1 and not negative:
        raise DiffLensError(
            f"cfg is {cfg:g}, which guides away from a negative, but none is connected. Connect it, or set cfg to 1."
        )


def check_noiseless(sampler_name: str) -> None:
    """Raise `DiffLensError` for a sampler that adds noise on the way.

    It draws the noise for the whole batch, so that equal pictures differ by their place in it, and an experiment would
    count chance as effect.
    """
    function = comfy.samplers.sampler_object(sampler_name).sampler_function
    if "noise_sampler" in inspect.signature(function).parameters and sampler_name not in ADD_NONE:
        raise DiffLensError(
            f"sampler {sampler_name} adds noise on the way, which is another for every place in a batch, so chance "
            "would be counted as effect. Choose one that adds none, such as euler or dpmpp_2m."
        )


def run_mark(
    model: ModelPatcher, positive: list, latent: dict, negative: list | None, cfg: float, *settings: Any
) -> str:  # fmt: skip
    """Tells what is sampled, and how, from anything else: model, patches, conditionings, latent and `settings`."""
    start = [empty_latents(model, positive, latent)[:1], *conditioning_content([*positive, *(negative or [])])]
    return digest(model_fingerprint(model), patches_mark(model), f"{cfg}{settings}", *content(start))


@dataclass(frozen=True)
class HostSampler:
    """A KSampler and its inputs as the core's `Sampler`; Cancel works at every step.

    latent: an empty latent, or one to start from, of which picture i takes row i of its batch, over and over. vae: for
    `decode`. Errors that come up at a site begin with the name `node`. on_step(images, step, x0, x, total): what a
    KSampler's callback is told, after the numbers of the batch's pictures.
    """

    model: ModelPatcher
    positive: list
    latent: dict
    steps: int
    sampler_name: str
    scheduler: str
    seed: int
    negative: list | None = None
    cfg: float = 1.0
    vae: comfy.sd.VAE | None = None
    node: str = "Capture Activations"
    on_step: Callable[..., None] = lambda *_: comfy.model_management.throw_exception_if_processing_interrupted()
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        check_guidance(self.negative, self.cfg)

    @cached_property
    def start(self) -> Tensor:
        """The latents to start from, a batch."""
        return empty_latents(self.model, self.positive, self.latent)

    @cached_property
    def sigmas(self) -> Tensor:
        """The noise levels of the schedule: steps + 1, the last 0."""
        return comfy.samplers.KSampler(
            self.model, self.steps, "cpu", self.sampler_name, self.scheduler, model_options=self.model.model_options
        ).sigmas

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    def owns(self, mark: str) -> bool:
        return belongs(mark, self.model)

    @cached_property
    def progress(self) -> tuple[float, ...]:
        return tuple(map(progress_of(self.model), self.sigmas[:-1].tolist()))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.start.shape[1:])

    @property
    def info(self) -> dict[str, Any]:
        inputs = digest(*content([self.start, *conditioning_content(self.positive)]))
        info = {
            "steps": self.steps, "sampler": self.sampler_name, "scheduler": self.scheduler,
            "latent and conditioning": inputs,
        }  # fmt: skip
        if self.cfg != 1:
            info |= {"cfg": self.cfg, "negative": digest(*content(conditioning_content(self.negative)))}
        return info | ({"patches": mark} if (mark := patches_mark(self.model)) else {})

    def sample(self, noise: Tensor, images: Tensor, edits: Sequence[Edit] = (), kept: Sequence[Kept] = ()) -> Tensor:
        """See `Sampler.sample`."""
        model = self.watched(kept) if kept else self.model
        for edit in edits:
            edited = functools.partial(self.edited, edit, images)
            model = apply_site(model, edit.site, edited, self.node, numbered=False)
        positive, negative = self.prompts(images)
        return comfy.sample.sample(
            model, noise.to(self.start.dtype), self.steps, self.cfg, self.sampler_name, self.scheduler, positive,
            negative, self.start[images % len(self.start)], disable_pbar=True,
            callback=functools.partial(self.on_step, images), seed=(self.seed + int(images[0])) % 2**64,
        )  # fmt: skip

    def prompts(self, images: Tensor) -> tuple[list, list]:
        """The positive and the negative of these pictures."""
        positive = of_pictures(self.positive, images)
        return positive, of_pictures(self.negative, images) if self.negative else positive

    def edited(self, edit: Edit, images: Tensor, rows: Tensor, progress: float, places: Tensor) -> Tensor:
        """`numbered`, with a word once if a recipe is stretched."""
        steering = innermost(edit)
        if isinstance(steering, Steering) and (sentence := steering.stretch(rows)) and sentence not in self.said:
            self.said.add(sentence)
            log.warning("%s: %s", self.node, sentence)
            tell(node_id(), sentence)
        return numbered(edit, images, rows, progress, places)

    def watched(self, kept: Sequence[Kept]) -> ModelPatcher:
        """A clone of the model that shows each of `kept` what it wants, of the rows of the first positive conditioning.

        There may be several positives, and negatives.
        """
        model = self.model

        def keep(one: Kept, h: Tensor, progress: float, images: Tensor) -> Tensor:
            distance = (torch.tensor(self.progress, dtype=torch.float64) - progress).abs()
            if float(distance.min()) <= SAME:
                one.keep(int(distance.argmin()), h)
            return h

        for one in kept:
            model = edit_site(
                model, one.site, functools.partial(keep, one), follows_first, Settings(self.node, numbered=False)
            )
        return model

    def decode(self, latents: Tensor) -> Tensor:
        """See `Sampler.decode`."""
        return self.vae.decode(latents).float().cpu()

    def predict(
        self, noise: Tensor, images: Tensor, site: str, steps: Sequence[int], on_prediction: OnPrediction
    ) -> None:
        """See `Sampler.predict`: by Euler's method over the schedule, whatever the sampler."""
        leaf, inner = Leaf(site), self.model.model
        edit = functools.partial(numbered, leaf, images)
        model = apply_site(self.model, site, edit, self.node, numbered=False)

        def euler(
            predict: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
        ) -> Tensor:
            for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
                x0 = predict(x, sigma * x.new_ones(len(x)), **extra_args)
                if step in steps and leaf.h is not None:
                    on_prediction(step, leaf.h, self.vae.decode(inner.process_latent_out(x0)).float())
                x0 = x0.detach()
                x = x0 + (x - x0) * (following / sigma)
                self.on_step(images, step, x0, x, len(sigmas) - 1)
            return x

        positive, negative = self.prompts(images)
        with training(), differentiable(inner.diffusion_model, self.vae.first_stage_model):
            comfy.sample.sample_custom(
                model, noise.to(self.start.dtype, copy=True), self.cfg, comfy.samplers.KSAMPLER(euler), self.sigmas,
                positive, negative, self.start[images % len(self.start)].clone(),
                disable_pbar=True, seed=(self.seed + int(images[0])) % 2**64,
            )  # fmt: skip


@contextmanager
def training() -> Iterator[None]:
    """While open, networks leave out fused code that cannot be differentiated, and may write into what they read."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            yield
    finally:
        comfy.model_management.in_training = before


def numbered(edit: Edit, images: Tensor, rows: Tensor, progress: float, places: Tensor) -> Tensor:
    """The edit of rows of pictures `images`, whose noise was chosen by the core and tells nothing of their numbers."""
    return edit(rows, progress, images.repeat_interleave(len(rows) // len(images)))


def capture(
    model: ModelPatcher,
    positive: list,
    latent: dict,
    pictures: int,
    steps: int,
    sampler_name: str,
    scheduler: str,
    seed: int,
    sites: tuple[str, ...],
    span: tuple[float, float] = (0.0, 1.0),
    dtype: str = "float16",
    folder: Path | None = None,
    negative: list | None = None,
    cfg: float = 1.0,
    most: int = 0,
    enough: Callable[[Tensor], bool] = lambda latents: True,
    view: LiveView | None = None,
    twins: int = 1,
) -> Store:
    """The core's `capture` in batches as large as `latent`, with previews and progress.

    Picture k starts from the noise that a stock KSampler draws for place k of a batch of `pictures`, so the batch size
    changes nothing (samplers that add noise on the way excepted). twins: so many in turn start from the same.
    """
    view = view or LiveView()
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def on_step(images: Tensor, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        done = int(images[0]) * steps + len(x0) * (step + 1)
        picture = previewer and previewer.decode_latent_to_preview_image("JPEG", x0)
        view(done, max(pictures, int(images[-1]) + 1) * steps, picture)

    sampler = HostSampler(
        model, positive, latent, steps, sampler_name, scheduler, seed, negative, cfg, on_step=on_step
    )  # fmt: skip
    batch = len(latent["samples"])
    return capture_with(
        sampler, pictures, seed, batch, sites, span, dtype, folder, most=most, enough=enough,
        room=functools.partial(check_room, folder), on_half=tell_half, twins=twins,
    )  # fmt: skip


def tell_half(at_once: int) -> None:
    """Say that a capture goes on with fewer pictures at once."""
    comfy.model_management.soft_empty_cache()
    sentence = (
        f"memory does not hold as many pictures at once; goes on with {at_once}. A smaller batch_size in Empty Latent "
        "Image saves the attempt."
    )
    log.warning("Capture Activations: %s", sentence)
    tell(node_id(), sentence)


def check_room(folder: Path | None, needed: int) -> None:
    """Say how many bytes a capture takes, and raise `DiffLensError` if there is no room: in `folder`, or in memory."""
    if folder is None:
        free, place, other = psutil.virtual_memory().available, "in main memory", "Name a folder in save_as, or draw"
    else:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free, place, other = shutil.disk_usage(there).free, "on the disk", "Make room there, or draw"
    if needed > free:
        raise DiffLensError(
            f"the capture takes {needed / 1e9:.1f} GB {place}, where {free / 1e9:.1f} GB are free. {other} fewer "
            "pictures, fewer sites, or a shorter part of the sampling."
        )
    if needed > WORTH_TELLING:
        tell(node_id(), f"takes {needed / 1e9:.1f} GB {place}.")


def experiment_noise(sampler: HostSampler, pictures: int) -> Tensor:
    """The noises of a run of `pictures`, as for a KSampler. Refuses samplers that add noise."""
    check_noiseless(sampler.sampler_name)
    (noise,) = noise_batches(sampler.shape, pictures, sampler.seed, pictures)
    return noise


def drawer(
    model: ModelPatcher, positive: list, latent: dict, vae: comfy.sd.VAE, pictures: int, steps: int, sampler_name: str,
    scheduler: str, seed: int, node: str, negative: list | None = None, cfg: float = 1.0,
) -> Drawer:  # fmt: skip
    """A drawer that samples from the noises of a run of `pictures`. Refuses samplers that add noise."""
    sampler = HostSampler(
        model, positive, latent, steps, sampler_name, scheduler, seed, negative, cfg, vae, node
    )  # fmt: skip
    return Drawer(sampler, experiment_noise(sampler, pictures))
