"""Directions hold what steering adds, and what ml-act has learnt steers by its published formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from difflens_core.files import DiffLensError, load_tensors
from difflens_core.locate import FrameProbes
from difflens_core.steer import (
    Steering,
    additive,
    directions_of,
    joined,
    load_ml_act,
    load_recipe,
    save_directions,
    save_recipe,
)

C = 6
RANGE = [torch.zeros(1, C), torch.ones(1, C)]


def class_of(images: torch.Tensor) -> torch.Tensor:
    return images % 3


# --- out ---


@pytest.mark.parametrize("mode", ["add", "add own", "add fixed", "add own fixed", "shift", "scale"])
def test_a_file_holds_what_steering_adds(toys, tmp_path, mode):
    recipe = replace(toys.recipe(mode=mode, start=0.2, hold=True), levels=toys.levels())
    written = save_directions(tmp_path / "d.safetensors", recipe)
    found, info = load_tensors(tmp_path / "d.safetensors", "directions")
    h, images = toys.activations().values[1], torch.arange(12)
    for row, progress in enumerate(info["progress"]):
        steered = Steering(written, class_of)(h, progress, images)
        acts = info["start"] <= progress <= info["end"]
        expected = h + acts * found["middle"][row, class_of(images)]
        torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
        assert acts == (row > 0) and torch.equal(steered, h) != acts
    kept = mode in ("add", "add own", "add fixed", "add own fixed")
    assert (written.mode, written.strength) == ((mode, recipe.strength) if kept else ("add", (1.0,) * 3))
    assert found["middle"].shape == (3, 3, C, *((1, 1) if "fixed" in mode else (2, 2)))


def test_recipes_of_several_sites_of_whole_maps_and_without_levels(toys, tmp_path):
    first, second = toys.recipe(), replace(toys.recipe(seed=8), site="other")
    assert directions_of(additive(joined(first, second))).keys() == {"middle", "other"}
    whole = replace(toys.recipe(width=4 * C, positions=1, mode="add"), normalisation=toys.normalisation())
    h = toys.activations().values[1]
    expected = Steering(whole, class_of)(h, 0.0, torch.arange(12)) - h
    torch.testing.assert_close(
        directions_of(whole)["middle"][0, class_of(torch.arange(12))], expected, atol=1e-5, rtol=1e-5
    )
    without = toys.recipe(positions=0, mode="scale")
    assert additive(without).mode == "add own fixed"
    uneven = replace(second, normalisation=toys.normalisation(steps=2))
    with pytest.raises(DiffLensError, match="captured at different steps. Write one file a site"):
        save_directions(tmp_path / "d.safetensors", joined(first, uneven))


def test_what_no_direction_can_do_is_refused(toys, tmp_path):
    frame = FrameProbes(torch.zeros(3, 4, C), torch.zeros(3, 4))
    with pytest.raises(DiffLensError, match="age goes by where things are in a picture, and a direction does not move"):
        save_directions(tmp_path / "d.safetensors", replace(toys.recipe(), frame=frame))
    written(tmp_path / "incr-gaussian_ot-mean", gaussian())
    with pytest.raises(DiffLensError, match="has one class and goes by what it finds in a picture .mode move."):
        additive(load_ml_act(tmp_path / "incr-gaussian_ot-mean", "age", "old"))
    assert not (tmp_path / "d.safetensors").exists()


# --- in ---


def gaussian(still: int = 2) -> dict:
    """What its hooks of mean_ot and gaussian_ot save; one channel of the source never varies."""
    draw = torch.Generator().manual_seed(1)
    state = {name: torch.randn(C, generator=draw) for name in ("mu1", "mu2")}
    state |= {name: 0.5 + torch.rand(C, generator=draw) for name in ("std1", "std2")}
    state["std1"][still] = 1e-5
    range_of = [torch.full((C,), -1.0), torch.ones(C)]
    return state | {"quantiles_dict_src": {"q_0_100": range_of}, "quantiles_src": [-1e6, 1e6]}


def linear(**more) -> dict:
    draw = torch.Generator().manual_seed(2)
    state = {name: torch.randn(1, C, generator=draw) for name in ("net.w1", "net.b1")}
    return state | {"quantiles_dict_src": {}, "quantiles_src": [-1e6, 1e6]} | more


def written(folder: Path, state: dict, module: str = "unet.mid_block.attentions.0.norm") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / f"{module}.statedict")
    return folder


def published(state: dict, method: str, h: torch.Tensor, strength: float) -> torch.Tensor:
    """Rodriguez et al. 2025 at maps or tokens h, written from the paper: strength T(h) + (1 - strength) h."""
    along = (1, -1, 1, 1) if h.ndim == 4 else (1, 1, -1)
    if method == "linear_ot":
        moved = state["net.w1"].view(along) * h + state["net.b1"].view(along)
        return strength * moved + (1 - strength) * h
    mu1, mu2, std1, std2 = (state[name].view(along) for name in ("mu1", "mu2", "std1", "std2"))
    ratio = std2 / std1 if method == "gaussian_ot" else 1.0
    moved = strength * (ratio * (h - mu1) + mu2) + (1 - strength) * h
    return torch.where((std1 > 1e-4) & (std2 > 1e-4), moved, h)


@pytest.mark.parametrize(
    ("method", "shape"),
    [("mean_ot", (4, C, 3, 5)), ("mean_ot", (4, 7, C)), ("gaussian_ot", (4, C, 3, 5)), ("linear_ot", (4, 7, C))],
)
def test_ml_act_steers_by_its_formula(tmp_path, method, shape):
    tokens = len(shape) == 3
    module = "unet.mid_block.attentions.0" + (".transformer_blocks.0.norm1:0" if tokens else ".norm")
    state = linear() if method == "linear_ot" else gaussian()
    recipe = load_ml_act(written(tmp_path / f"incr-{method}-mean", state, module), "age", "old")
    assert recipe.site == module.removeprefix("unet.").removesuffix(":0") and recipe.classes == ("old",)
    save_recipe(tmp_path / "r.safetensors", recipe)
    h = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    shown = h.transpose(1, 2)[..., None] if tokens else h
    for own in (recipe, load_recipe(tmp_path / "r.safetensors")):
        for strength in (1.0, 0.4):
            steering = Steering(replace(own, strength=(strength,)), torch.zeros_like)
            for progress in (0.0, 0.7):
                found = steering(shown, progress, torch.arange(4))
                found = found[..., 0].transpose(1, 2) if tokens else found
                torch.testing.assert_close(found, published(state, method, h, strength), atol=1e-5, rtol=1e-5)


def test_ml_act_of_several_modules_is_one_recipe_and_what_it_adds_can_be_written(tmp_path):
    folder = written(tmp_path / "incr-mean_ot-mean", gaussian())
    recipe = load_ml_act(written(folder, gaussian(still=0), "unet.up_blocks.0"), "age", "old")
    assert recipe.sites == ("mid_block.attentions.0.norm", "up_blocks.0")
    save_directions(tmp_path / "d.safetensors", recipe)
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        expected = gaussian()["mu2"] - gaussian()["mu1"]
        expected[0] = 0
        torch.testing.assert_close(file.get_tensor("up_blocks.0"), expected.view(1, 1, C, 1, 1))


@pytest.mark.parametrize(
    ("folder", "state", "module", "said"),
    [
        ("incr-linear_ot-mean", linear(), "unet.mid_block", "linear_ot moves the mean of a map"),
        ("incr-linear_ot-mean", linear(quantiles_src=RANGE), "unet.mid_block", "Learn it with quantiles_src=q_all"),
        ("mine", gaussian(), "unet.mid_block", "this one is 'mine'. Give the folder its name back"),
        ("incr-mean_ot-mean", gaussian(), "vae.decoder", "it is of vae.decoder, and only what modules of unet"),
        ("incr-mean_ot-mean", gaussian(), "unet.down_blocks.0:1", "put out first is read"),
        ("incr-mean_ot-mean", {"mu1": 3}, "unet.mid_block", "its settings are damaged"),
        ("incr-mean_ot-mean", gaussian() | {"mu1": torch.full((C,), torch.nan)}, "unet.mid_block", "NaN"),
    ],
)  # fmt: skip
def test_what_no_recipe_can_do_is_refused_by_the_files_name(tmp_path, folder, state, module, said):
    with pytest.raises(DiffLensError, match=f"{module}.statedict: .*{said}"):
        load_ml_act(written(tmp_path / folder, state, module), "age", "old")


def test_a_folder_without_such_files_is_refused(tmp_path):
    with pytest.raises(DiffLensError, match="holds no .statedict file"):
        load_ml_act(tmp_path, "age", "old")
