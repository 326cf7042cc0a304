"""Recipes that follow the subject: wherever and however large it is, the edit is the same in its frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.activations import (
    GRID,
    Activations,
    FramedActivations,
    Rehearsal,
    Shown,
    into_frames,
    out_of_frames,
    slopes_in_frames,
)
from difflens_core.experiments.effects import OneLatent
from difflens_core.locate import FrameProbes, fit_frames, in_frames
from difflens_core.locate.frames import aligned
from difflens_core.sae import Normalisation
from difflens_core.steer import MODES, Steering, load_recipe, save_recipe
from difflens_core.steer.steering import BY_LEVELS

WIDTH = 6
FRAME = (0.25, 0.125, 0.75, 0.625)


def fixed_frames(frame: tuple[float, ...], size: tuple[int, int], steps: int = 3) -> FrameProbes:
    """Probes that read a frame's place from channels 0 and 1, which say where a position is, and say 1 everywhere."""
    left, top, right, bottom = frame
    height, width = size
    weight, bias = torch.zeros(steps, 4, WIDTH), torch.zeros(steps, 4)
    weight[:, 1, 0] = weight[:, 2, 1] = -1
    side = (bottom - top) * height
    bias[:] = torch.tensor([1.0, (left + right) / 2 * width, (top + bottom) / 2 * height, 0.0])
    bias[:, 3] = torch.tensor(side).log()
    return FrameProbes(weight, bias)


@pytest.fixture
def framed(toys):
    """A recipe in the frame FRAME of 16 x 16 maps, the maps, and its twin for what is in the frame."""
    plain = replace(toys.recipe(width=WIDTH, positions=GRID**2), levels=toys.levels(width=WIDTH, positions=GRID**2))
    plain = replace(
        plain, normalisation=Normalisation(plain.normalisation.progress, torch.zeros(3, WIDTH), torch.ones(3))
    )
    plain = replace(plain, map=(GRID, GRID))
    size = (16, 16)
    h = toys.random(3)(2, WIDTH, *size)
    y, x = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    h[:, 0], h[:, 1] = x, y
    return replace(plain, frame=fixed_frames(FRAME, size)), plain, h


@pytest.mark.parametrize("mode", MODES)
def test_the_edit_is_that_of_the_frame_laid_back(framed, mode):
    recipe, plain, h = framed
    frames, asked = torch.tensor([FRAME, FRAME]), lambda images: images + 1
    inside = into_frames(h, frames)
    expected = Steering(replace(plain, mode=mode), asked)(inside, 0.4, torch.arange(2)) - inside
    change = Steering(replace(recipe, mode=mode), asked)(h, 0.4, torch.arange(2)) - h
    torch.testing.assert_close(change, out_of_frames(expected, frames, (16, 16)), atol=1e-4, rtol=1e-3)
    assert change[:, :, 2:10, 4:12].abs().max() > 0.01 and not change[:, :, 12:].any()


def test_a_mask_and_pictures_left_alone_count_as_elsewhere(framed):
    recipe, _, h = framed
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    both = Steering(recipe, lambda images: torch.tensor([1, -1])[images], mask=mask)(h, 0.4, torch.arange(2))
    assert torch.equal(both[1], h[1]) and torch.equal(both[0, :, :, 8:], h[0, :, :, 8:])
    assert not torch.equal(both[0], h[0])


def test_a_held_picture_without_a_subject_is_left_as_it_is_and_counted(framed):
    recipe, _, h = framed
    recipe.frame.weight[:, 0, 5] = 1
    h[:, 5] = torch.tensor([0.0, -5.0])[:, None, None]  # nowhere in the second is anything surely the subject's
    steering, rehearsal = Steering(recipe, lambda images: images + 1), Rehearsal(recipe.site)
    for progress in (0.4, 0.9):
        rehearsal(h, progress, torch.arange(2))
    assert steering.empty(Shown(h, 0.9)).tolist() == [False, True]
    steered = steering(h, 0.4, torch.arange(2), Shown(h, 0.9))
    assert torch.equal(steered[1], h[1]) and not torch.equal(steered[0], h[0])
    assert "found none in 1 of 2, which were left as they are" in steering.missed(rehearsal.last, held=True)
    assert "were changed at a guessed place" in steering.missed(rehearsal.last, held=False)
    found = Rehearsal(recipe.site)
    found(h[:1], 0.9, torch.arange(1))
    assert steering.missed(found.last, held=True) == ""
    assert Steering(replace(recipe, frame=None), torch.Tensor.long).missed(rehearsal.last, held=True) == ""


def test_frames_that_the_rows_tell_of_are_found(toys):
    draw, pictures, size = toys.random(5), 40, (8, 12)
    place = torch.rand(pictures, 2, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.1
    side = 0.35 + 0.2 * torch.rand(pictures, 1, generator=torch.Generator().manual_seed(2))
    frames = torch.cat([place, place + side * torch.tensor([8 / 12, 1.0])], dim=1)
    values = draw(2, pictures, WIDTH, *size) * 0.01
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(12) + 0.5, indexing="ij")
    edges = frames * torch.tensor([12, 8, 12, 8])
    centre, cells = (edges[:, :2] + edges[:, 2:]) / 2, edges[:, 3] - edges[:, 1]
    values[:, :, 0] += x - centre[:, 0, None, None]
    values[:, :, 1] += y - centre[:, 1, None, None]
    values[:, :, 2] += cells.log()[:, None, None]
    near = ((x - centre[:, 0, None, None]).abs() < 0.35 * cells[:, None, None]) & (
        (y - centre[:, 1, None, None]).abs() < 0.45 * cells[:, None, None]
    )
    values[:, :, 3] += near
    captured = Activations(values, torch.tensor([0.0, 0.5]), "middle")
    norm = Normalisation(captured.progress, torch.zeros(2, WIDTH), torch.ones(2))
    probes = fit_frames(FramedActivations.of(captured, frames), norm)
    for step in range(2):
        found = probes.find(values[step].flatten(2), size, step)
        assert (found - frames).abs().max() < 0.02
    assert not aligned(frames, size) and aligned(frames[:1].expand(9, 4), size)


@pytest.mark.parametrize("mode", BY_LEVELS)
def test_a_recipe_with_a_frame_is_read_as_it_was_written(framed, tmp_path, mode):
    recipe, _, h = framed
    recipe = replace(recipe, mode=mode)
    path = tmp_path / "framed.safetensors"
    save_recipe(path, recipe)
    once = load_recipe(path)  # rounded to fp16
    save_recipe(path, once)
    before, after = (Steering(r, lambda images: images)(h, 0.4, torch.arange(2)) for r in (once, load_recipe(path)))
    assert torch.equal(before, after) and not torch.equal(before, h)
    assert (once.frame.weight - recipe.frame.weight).abs().max() < 1e-3


def test_slopes_in_frames_are_those_of_what_is_laid_back(toys):
    frames, draw = torch.tensor([FRAME, (-0.1, 0.3, 0.5, 1.1)]), toys.random(7)
    slopes, maps = draw(2, 3, 12, 16), draw(2, 3, GRID, GRID)
    expected = (out_of_frames(maps, frames, (12, 16)) * slopes).sum()
    assert float((slopes_in_frames(slopes, frames) * maps).sum()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("mode", ["ablate", "amplify"])
def test_a_latent_is_changed_alone_where_the_subject_is(framed, mode):
    recipe, plain, h = framed
    frames, latents = torch.tensor([FRAME, FRAME]), torch.tensor([2, -1])
    inside = into_frames(h, frames)
    expected = OneLatent(plain, latents, mode)(inside, 0.4, torch.arange(2)) - inside
    change = OneLatent(recipe, latents, mode)(h, 0.4, torch.arange(2)) - h
    torch.testing.assert_close(change, out_of_frames(expected, frames, (16, 16)), atol=1e-4, rtol=1e-3)
    assert change[0].abs().max() > 0.01 and not change[1].any()
    elsewhere = OneLatent(plain, latents, mode)(h, 0.4, torch.arange(2))  # 16 x 16 positions for 8 x 8: stretched
    assert elsewhere.shape == h.shape and not torch.equal(elsewhere[0], h[0])


def test_subjects_are_followed_where_they_are_found_at_different_places(toys):
    activations, sae = toys.activations(pictures=4), toys.sae()
    frames = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.1, 0.9, 0.5], [0.0, 0.5, 0.5, 1.0], [torch.nan] * 4])
    assert isinstance(in_frames(activations, frames, sae), FramedActivations)
    assert in_frames(activations, None, sae) is activations
    assert in_frames(activations, frames[:3], sae) is activations, "labels of other pictures are refused elsewhere"
    assert in_frames(activations, frames[:1].expand(4, 4), sae) is activations
    assert in_frames(activations, torch.full((4, 4), torch.nan), sae) is activations
    whole = replace(toys.sae(width=24), normalisation=toys.normalisation(), kernel=2)
    assert in_frames(activations, frames, whole) is activations
