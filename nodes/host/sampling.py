"""Sampling for nodes that draw pictures of their own: capture, and experiments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ...difflens_core.activations import DTYPES, SAMPLES, Draw, Index, Shard, Store, noise_batches, record
from ...difflens_core.activations import Edit as SiteEdit
from ...difflens_core.files import DiffLensError, digest
from .edits import apply_site, edit_site, progress_of
from .marks import conditioning_tensors, content, model_fingerprint, patches_mark
from .progress import progress_bar

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


def empty_latents(model: ModelPatcher, positive: list, latent: dict) -> Tensor:
    """The latents that a sampler starts from, with the channels of the model. Refuses empty inputs."""
    if not positive:
        raise DiffLensError("the positive conditioning is empty. Connect one, such as Load Unconditional Model's.")
    if len(latent["samples"]) == 0:
        raise DiffLensError("the latent image holds no picture. Set the batch size of Empty Latent Image to 1 or more.")
    keys = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *(latent.get(key) for key in keys))


class Watch:
    """Keeps what `sites` put out at the noise levels `sigmas` while `model`, a clone, samples one batch.

    Of the rows, those that follow the first positive conditioning: there may be several, and negatives.
    """

    def __init__(self, model: ModelPatcher, sites: tuple[str, ...], sigmas: Tensor, dtype: torch.dtype):
        self.sites, self.sigmas, self.dtype = sites, sigmas, dtype
        for site in sites:
            model = edit_site(model, site, functools.partial(self.keep, site), "Capture Activations", self.chosen)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "difflens", self.begin)
        self.model = model
        self.clear()

    def begin(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        self.first = executor.class_obj.conds["positive"][0]["uuid"]
        return executor(*args, **kwargs)

    def chosen(self, options: dict) -> list[bool]:
        # Where only the positive is for an area, ComfyUI makes a negative for it that goes by the same uuid.
        pairs = zip(options["cond_or_uncond"], options["uuids"], strict=True)
        return [kind == 0 and uuid == self.first for kind, uuid in pairs]

    def clear(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.seen: set[tuple[str, int]] = set()

    def keep(self, site: str, h: Tensor, sigma: float, images: Tensor) -> Tensor:
        step = int((self.sigmas - sigma).abs().argmin())
        if abs(float(self.sigmas[step]) - sigma) <= 1e-4 * sigma:
            by_position = h.movedim(1, -1)
            if site not in self.values:
                self.values[site] = torch.empty(len(self.sigmas), *by_position.shape, dtype=self.dtype)
            self.values[site][step] = by_position
            self.seen.add((site, step))
        return h

    def take(self) -> dict[str, Tensor]:
        """S x b x H x W x C of every site. Raises `DiffLensError` if a step was not seen."""
        for site in self.sites:
            steps = sum(site == seen for seen, _ in self.seen)
            if steps < len(self.sigmas):
                raise DiffLensError(
                    f"{site} was read at {steps} of {len(self.sigmas)} steps: either the sampler leaves the schedule "
                    "or the model does not run this module at all of them. Use sampler euler and a site that it runs."
                )
        values = self.values
        self.clear()
        return values


def check_guidance(negative: list | None, cfg: float) -> None:
    """Raises `DiffLensError` if there is nothing to guide away from."""
    if cfg != 1 and not negative:
        raise DiffLensError(
            f"cfg is {cfg:g}, which guides away from a negative, but none is connected. Connect it, or set cfg to 1."
        )


def run_mark(
    model: ModelPatcher, positive: list, latent: dict, negative: list | None, cfg: float, *settings: Any
) -> str:  # fmt: skip
    """Tells what is sampled, and how, from anything else: model, patches, conditionings, latent and `settings`."""
    start = [empty_latents(model, positive, latent)[:1], *conditioning_tensors([*positive, *(negative or [])])]
    return digest(model_fingerprint(model), patches_mark(model), f"{cfg}{settings}", *content(start))


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
) -> Store:
    """Sample `pictures` pictures in batches as large as `latent`, keeping what `sites` put out for the positive.

    Kept are the steps whose progress lies in `span`, in memory or in `folder`, where a capture that was cut off is
    gone on with (`record`). The store's samples are the finished latents. Picture k starts from the noise that a stock
    KSampler draws for place k of a batch of `pictures`, so the batch size changes nothing (samplers that add noise on
    the way excepted).
    """
    start, batch = empty_latents(model, positive, latent), len(latent["samples"])
    schedule = comfy.samplers.KSampler(model, steps, "cpu", sampler_name, scheduler, model_options=model.model_options)
    passed = [*map(progress_of(model), schedule.sigmas[:-1].tolist())]
    kept = [step for step, progress in enumerate(passed) if span[0] <= progress <= span[1]]
    if not kept:
        raise DiffLensError(f"no step lies between {span[0]} and {span[1]} of the sampling. Widen the span.")
    check_guidance(negative, cfg)
    inputs = digest(*content([start, *conditioning_tensors(positive)]))
    info = {"steps": steps, "sampler": sampler_name, "scheduler": scheduler, "latent and conditioning": inputs}
    if cfg != 1:
        info |= {"cfg": cfg, "negative": digest(*content(conditioning_tensors(negative)))}
    info |= {"patches": mark} if (mark := patches_mark(model)) else {}
    progress = tuple(passed[step] for step in kept)
    index = Index(sites, progress, pictures, min(batch, pictures), seed, model_fingerprint(model), dtype, info)
    watch = Watch(model, sites, schedule.sigmas[kept], DTYPES[dtype])
    report = progress_bar(pictures * steps)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def draw(first: int, noise: Tensor) -> Shard:
        def on_step(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            done = first * steps + len(x0) * (step + 1)
            report(done, previewer and previewer.decode_latent_to_preview_image("JPEG", x0))

        samples = comfy.sample.sample(
            watch.model, noise.to(start.dtype), steps, cfg, sampler_name, scheduler, positive, negative or positive,
            start[: len(noise)], callback=on_step, disable_pbar=True, seed=(seed + first) % 2**64,
        )  # fmt: skip
        return watch.take() | {SAMPLES: samples.cpu()}

    return record(index, noise_batches(start.shape[1:], pictures, seed, batch), draw, folder)


def drawer(
    model: ModelPatcher, positive: list, latent: dict, vae: comfy.sd.VAE, pictures: int, steps: int, sampler_name: str,
    scheduler: str, seed: int, node: str, negative: list | None = None, cfg: float = 1.0,
) -> Draw:  # fmt: skip
    """`Draw` that samples from the noises of a run of `pictures`; Cancel works at every step.

    Edits act on what the positive conditioning draws. Errors that come up while sampling begin with the name `node`.
    """
    check_guidance(negative, cfg)
    start = comfy.utils.repeat_to_batch_size(empty_latents(model, positive, latent), pictures)
    noise = comfy.sample.prepare_noise(start, seed)

    def draw(edits: Sequence[SiteEdit], which: Tensor) -> Tensor:
        edited = model
        for edit in edits:
            edited = apply_site(edited, edit.site, edit, node)
        samples = comfy.sample.sample(
            edited, noise[which], steps, cfg, sampler_name, scheduler, positive, negative or positive, start[which],
            callback=lambda *_: comfy.model_management.throw_exception_if_processing_interrupted(),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        return vae.decode(samples).float().cpu()

    return draw
