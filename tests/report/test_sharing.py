"""Whose a recipe is, in its file: kept, never stale, small, shown, and harmless from strangers."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from difflens_core.files import DiffLensError, difflens_info
from difflens_core.report import example_grid, example_of, provenance, provenance_text, with_provenance
from difflens_core.report.sharing import JPEG, SIDE
from difflens_core.steer import load_recipe, save_recipe


def test_a_file_tells_what_it_was_given_and_what_it_was_told_before(toys, tmp_path):
    path, example = tmp_path / "r.safetensors", example_grid(torch.rand(8, 64, 64, 3))
    recipe = replace(toys.recipe(), info={"calibration": {"target": [1]}})
    save_recipe(path, with_provenance(recipe, " Kai ", "CC-BY-4.0", "SDXL base 1.0", example))
    found = load_recipe(path)
    assert provenance(difflens_info(path)) == {
        "attribute": "age", "classes": ["young", "adult", "senior"], "model": "abc", "author": "Kai",
        "licence": "CC-BY-4.0", "model_name": "SDXL base 1.0", "calibrated": True, "of_0.4": False,
    }  # fmt: skip
    assert provenance_text(difflens_info(path)) == (
        "Recipe for age (young, adult, senior) in SDXL base 1.0, made by Kai. Licence: CC-BY-4.0."
    )
    assert example_of(found).shape == (128, 256, 3)
    again = with_provenance(found, author="Kai and Lou")
    assert again.info["author"] == "Kai and Lou" and again.info["licence"] == "CC-BY-4.0"
    assert example_of(again) is None  # it may have been changed since


def test_what_a_file_does_not_tell_is_said(toys, tmp_path):
    path = tmp_path / "r.safetensors"
    save_recipe(path, toys.recipe())
    info = difflens_info(path)
    assert provenance_text(info) == "Recipe for age (young, adult, senior). Its file names no licence."
    random = {**info, "info": {"control": "random latents"}}
    assert provenance_text(random).startswith("A control, to compare others with: random latents. Recipe for age")
    del info["hold"]  # as files of 0.4 are
    assert provenance(info)["of_0.4"] and "made by version 0.4 or before" in provenance_text(info)
    long = {"info": {"licence": 10**300, "author": "x" * 10**6}, "classes": 3}
    assert len(provenance_text(long)) < 600
    named = {"attribute": "a" * 10**6, "classes": ["b" * 10**6, "c"], "info": {}}
    assert len(provenance_text(named)) < 600 and "a… (b" in provenance_text(named)


@pytest.mark.parametrize("shape", [(1, 700, 1400, 3), (1, 40, 30, 3), (3, 512, 768, 3), (20, 1024, 1024, 3)])
def test_an_example_is_small_whatever_it_is_made_of(toys, shape):
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(1))  # the worst to compress
    grid = example_grid(torch.nn.functional.avg_pool2d(noise.movedim(-1, 1), 3, 1, 1).movedim(1, -1))
    shown = example_of(with_provenance(toys.recipe(), example=grid))
    assert max(shown.shape) <= SIDE and len(grid) < 100_000


def written(kind: str, size: tuple[int, int], more: int = 0) -> str:
    """A picture's file with so many bytes behind it, which no reader minds."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(file, kind)
    return b64encode(file.getvalue() + bytes(more)).decode()


@pytest.mark.parametrize(
    "example",
    [3, "", "data:image/png;base64,", f"{JPEG}%%%", f"{JPEG}AAAA", JPEG + written("PNG", (8, 8)),
     JPEG + written("JPEG", (SIDE + 1, 8)), JPEG + written("JPEG", (8, 8))[:80], JPEG + written("JPEG", (8, 8), 10**6)],
    ids=lambda example: str(example)[:40],
)  # fmt: skip
def test_an_example_that_is_none_is_refused_in_one_sentence(toys, example):
    recipe = replace(toys.recipe(), info={"example": example})
    with pytest.raises(DiffLensError, match="The recipe's example cannot be shown") as caught:
        example_of(recipe)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
