"""Reading and changing what a site puts out while ComfyUI samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ...difflens_core.activations import edit_site as hooked
from ...difflens_core.files import DiffLensError
from .progress import named
from .sites import MIDDLE_BLOCK, Picture, own_name, site_width

Edit = Callable[[Tensor, float, Tensor], Tensor]
EditRows = Callable[[Tensor, dict], Tensor]


def progress_of(model: ModelPatcher) -> Callable[[float], float]:
    """A function from sigma to the share of timesteps behind it: 0 is pure noise, 1 the picture.

    1 - sigma for flow models. A node that changes the model's sampling belongs before the one that calls this.
    """
    model_sampling = model.get_model_object("model_sampling")
    first = float(model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max)))

    def progress(sigma: float) -> float:
        share = 1 - float(model_sampling.timestep(torch.tensor(sigma))) / first
        return min(1.0, max(0.0, round(share, 6)))

    return progress


UNEDITED = "difflens_unedited"  # entry of transformer_options: in this evaluation all sites stay as they are


# Which conditioning an edit is for: entries of `cond_or_uncond`, in which 0 is the positive.
CONDITIONINGS = {"positive": (0,), "negative": (1,), "both": (0, 1)}


# For the chunks of a batch, of which each follows a conditioning: is an edit for them?
Follows = Callable[[dict], list[bool]]


def follows(conditioning: str) -> Follows:
    """For chunks that follow a conditioning (one of CONDITIONINGS)."""
    return lambda options: [kind in CONDITIONINGS[conditioning] for kind in options["cond_or_uncond"]]


def edit_rows(h: Tensor, options: dict, edit: Edit, chosen: Sequence[bool]) -> Tensor:
    """Let `edit(rows, sigma, images)` change the chosen chunks of h.

    h holds a chunk of the latent batch for every entry of `cond_or_uncond`. Returns h itself if every chunk comes
    back as it was, or if the sampler asks for the unedited model (UNEDITED). Reads one sigma, which on a GPU waits for
    the device once an evaluation.
    """
    if options.get(UNEDITED):
        return h
    if h.ndim != 4:
        raise DiffLensError(
            f"the site puts out {h.ndim} dimensions, expected batch x channels x height x width, or batch x tokens x "
            "channels."
        )
    sigma = float(options["sigmas"][0])
    chunks = h.chunk(len(chosen))
    edited = [
        edit(chunk, sigma, torch.arange(len(chunk))) if mine else chunk
        for chunk, mine in zip(chunks, chosen, strict=True)
    ]
    if all(new is old for new, old in zip(edited, chunks, strict=True)):
        return h
    return torch.cat(edited)


class MiddleBlockPatch:
    """Edit as a `middle_block_after_patch`: hooks on the mid block of ComfyUI's UNet never fire."""

    def __init__(self, edit: EditRows):
        self.edit = edit

    def __call__(self, args: dict) -> dict:
        return {"h": self.edit(args["h"], args["transformer_options"])}


class HookWrapper:
    """Edit as a forward hook that lives for one evaluation of the model.

    Around APPLY_MODEL, because SD3's network runs no DIFFUSION_MODEL wrappers.
    """

    def __init__(self, site: str, edit: EditRows):
        self.site, self.edit = site, edit

    def __call__(self, executor: WrapperExecutor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
        network = executor.class_obj.diffusion_model
        with hooked(network, self.site, lambda h: self.edit(h, options), Picture(network, self.site, x)):
            return executor(x, *args, **kwargs)


def edit_site(model: ModelPatcher, site: str, edit: Edit, node: str, chosen: Follows) -> ModelPatcher:
    """A clone of the model in which `edit(rows, sigma, images)` changes what is read at `site` in the chosen rows.

    Errors that come up while sampling begin with the name `node`.
    """
    site_width(model, site)
    clone, site = model.clone(), own_name(model, site)

    def apply(h: Tensor, options: dict) -> Tensor:
        with named(node):
            return edit_rows(h, options, edit, chosen(options))

    if site == MIDDLE_BLOCK:
        clone.set_model_middle_block_after_patch(MiddleBlockPatch(apply))
    else:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "difflens", HookWrapper(site, apply))
    return clone


def apply_site(model: ModelPatcher, site: str, fn: Edit, node: str, conditioning: str = "positive") -> ModelPatcher:
    """A clone of the model in which `fn(h, progress, images)` changes what `site` puts out.

    h: B x C x H x W, rows of the `conditioning` only; progress: 0 to 1; images: B, places in the latent
    batch. If fn gives h back, the result is bit-identical. Raises `DiffLensError` if the model lacks the site.
    """
    progress = progress_of(model)
    return edit_site(model, site, lambda h, sigma, images: fn(h, progress(sigma), images), node, follows(conditioning))
