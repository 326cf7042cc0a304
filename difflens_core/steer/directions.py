"""Recipes as plain directions that any program can add, and what ml-act has learnt as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import DiffLensError, finite, read_content, reading, save_tensors
from ..locate import Levels
from ..sae import Normalisation
from .recipes import ALWAYS, Recipe, joined
from .steering import Steering

FIXED = ("add fixed", "add own fixed")
ADDING = ("add", "add own", *FIXED)  # modes that add the same to all pictures of a class, if levels know no traits


# --- out ---


def additive(recipe: Recipe) -> Recipe:
    """The recipe in a mode that adds the same to all pictures of a class, whatever else they show.

    One in a mode of `ADDING` keeps it and its strengths. The strengths of others were found for another mode: they
    become add at strength 1, or add own fixed where levels are not known. Raises `DiffLensError` if no direction can
    take the recipe's place.
    """
    if any(part.frame or part.changes for part in recipe.parts):
        raise DiffLensError(
            f"the recipe for {recipe.attribute} goes by where things are in a picture, and a direction does not move. "
            "Attribute again with a classifier that looks for no faces, on pictures that are no twins."
        )
    settings: dict[str, Any] = {"hold": False}
    if recipe.mode not in ADDING:
        if len(recipe.classes) == 1:
            raise DiffLensError(
                f"the recipe for {recipe.attribute} has one class and goes by what it finds in a picture (mode "
                f"{recipe.mode}): there is no direction in it. Use a recipe of two classes or more."
            )
        mode = "add" if all(part.levels.positions for part in recipe.parts) else "add own fixed"
        settings |= {"mode": mode, "strength": (1.0,) * len(recipe.classes)}
    first, *further = (replace(part, levels=part.levels.without_traits(), **settings) for part in recipe.parts)
    return replace(first, further=tuple(further))


def directions_of(recipe: Recipe) -> dict[str, Tensor]:
    """What an `additive` recipe adds to the output of each of its sites: S x K x C x H x W, strengths and all.

    Steps are those of its normalisation; H and W are 1 where it adds the same everywhere.
    """
    found = {}
    for part in recipe.parts:
        size = (part.kernel, part.kernel)
        if part.kernel == 1 and part.mode not in FIXED:
            size = part.grid or (part.levels.positions, 1)
        steering = Steering(replace(part, start=0.0, end=1.0), lambda classes: classes)
        nothing, each = torch.zeros(len(part.classes), part.channels, *size), torch.arange(len(part.classes))
        found[part.site] = torch.stack([steering(nothing, at, each) for at in part.normalisation.progress.tolist()])
    return found


def save_directions(path: str | Path, recipe: Recipe) -> Recipe:
    """Write what the recipe's `additive` form adds, for programs without this library; returns that form.

    One tensor a site, see `directions_of`; docs/directions.md describes the file. Raises `DiffLensError` as `additive`
    does, or if the sites were captured at different steps.
    """
    recipe = additive(recipe)
    progress = [part.normalisation.progress.tolist() for part in recipe.parts]
    if any(other != progress[0] for other in progress[1:]):
        raise DiffLensError(
            f"the recipe for {recipe.attribute} has sites that were captured at different steps. Write one file a site."
        )
    info = {name: getattr(recipe, name) for name in ("attribute", "classes", "model", "mode", "start", "end")}
    save_tensors(path, "directions", directions_of(recipe), info | {"sites": recipe.sites, "progress": progress[0]})
    return recipe


# --- in ---

NETWORK = "unet."  # what their names of our sites begin with
TOKENS = "transformer_blocks."  # in the names of modules that put out tokens
STD = 1e-4  # channels of which source or target varies less, mean_ot and gaussian_ot leave alone
ANYWHERE = 1e6  # their range from minus this to this is no range
MOST_CHANNELS = 8192  # of a map: a recipe of C channels holds C x C numbers


def load_ml_act(folder: str | Path, attribute: str, name: str) -> Recipe:
    """What ml-act has learnt, a folder of .statedict files, as a recipe of one class: the pictures of the target.

    mean_ot adds to each channel; gaussian_ot, and linear_ot for tokens, map it to w h + b (Rodriguez et al. 2025, arXiv
    2410.23054). It is the same at all steps. Raises `DiffLensError` that names the file that a recipe cannot hold.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.statedict"))
    if not files:
        raise DiffLensError(
            f"{folder} holds no .statedict file. Give the folder that ml-act wrote its interventions to."
        )
    parts = []
    for path in files:
        with reading(path):
            site = site_of(path.stem)
            weight, bias = affine_map(read_content(path), folder.name, site)
            parts.append(
                moved(site, attribute, name, bias) if weight is None else mapped(site, attribute, name, weight, bias)
            )
    with reading(folder):
        return joined(*parts)


def site_of(module: str) -> str:
    """Our name of a module of theirs, such as unet.mid_block.attentions.0.norm:0."""
    site, _, output = module.removeprefix(NETWORK).partition(":")
    if not module.startswith(NETWORK) or output not in ("", "0"):
        raise DiffLensError(f"it is of {module}, and only what modules of {NETWORK}* put out first is read.")
    return site


def affine_map(state: Mapping[str, Any], method: str, site: str) -> tuple[Tensor | None, Tensor]:
    """w (C, None if all are 1) and b (C) of one of their files, in a folder whose name tells the method."""
    low, high = (torch.as_tensor(end) for end in state["quantiles_src"])
    if float(low.max()) > -ANYWHERE or float(high.min()) < ANYWHERE:
        raise DiffLensError(
            "it acts in a range of its source alone, which a recipe cannot. Learn it with quantiles_src=q_all."
        )
    if "net.w1" in state:
        if TOKENS not in site:
            raise DiffLensError(
                "linear_ot moves the mean of a map, which a recipe cannot. Take gaussian_ot or mean_ot."
            )
        tensors = finite({name: state[f"net.{name}"].float().flatten() for name in ("w1", "b1")})
        return tensors["w1"], tensors["b1"]
    tensors = finite({name: state[name].float() for name in ("mu1", "mu2", "std1", "std2")})
    acts = (tensors["std1"] > STD) & (tensors["std2"] > STD)
    if "mean_ot" in method.split("-"):
        return None, acts * (tensors["mu2"] - tensors["mu1"])
    if "gaussian_ot" not in method.split("-"):
        raise DiffLensError(
            f"mean_ot and gaussian_ot keep the same numbers, and the folder's name tells which, as incr-mean_ot-mean "
            f"does; this one is {method!r}. Give the folder its name back."
        )
    weight = torch.where(acts, tensors["std2"] / tensors["std1"], 1.0)
    return weight, acts * (tensors["mu2"] - weight * tensors["mu1"])


def moved(site: str, attribute: str, name: str, direction: Tensor) -> Recipe:
    """The recipe of one class that adds a direction (C), by a latent that is just that."""
    none = torch.zeros(1, 1, 1, 0)
    return plain(site, attribute, name, torch.zeros(1, len(direction)), direction[None], none, "add own fixed")


def mapped(site: str, attribute: str, name: str, weight: Tensor, bias: Tensor) -> Recipe:
    """The recipe of one class that makes w h + b of h in every channel: it moves (1 - w) h to b."""
    width = len(bias)
    if width > MOST_CHANNELS:
        raise DiffLensError(f"it maps {width} channels, and a recipe can map {MOST_CHANNELS} at most.")
    return plain(site, attribute, name, (1 - weight).diag(), torch.eye(width), bias.view(1, 1, width, 1), "move")


def plain(
    site: str, attribute: str, name: str, encoder: Tensor, decoder: Tensor, levels: Tensor, mode: str
) -> Recipe:  # fmt: skip
    """A recipe of one class and step whose latents (F x C) are always active, of activations as they are."""
    count, width = decoder.shape
    return Recipe(
        attribute, (name,), site, "", torch.arange(count), encoder, torch.zeros(count), torch.full((count,), ALWAYS),
        decoder, torch.ones(1, count, dtype=torch.bool), Levels.of(levels), torch.zeros(1, 1, width), torch.zeros(1, 1),
        Normalisation(torch.zeros(1), torch.zeros(1, width), torch.ones(1)), mode, (1.0,), info={"from": "ml-act"},
    )  # fmt: skip
