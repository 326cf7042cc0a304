"""Every steering mode against loops that build the whole latent vector, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflens_core.files import DiffLensError
from difflens_core.recipes import MODES, Recipe
from difflens_core.steering import Steering

TARGETS = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1])
IMAGES = torch.arange(8)


def steer(recipe: Recipe, h: torch.Tensor, progress: float = 0.4, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return Steering(recipe, lambda i: TARGETS[i])(h, progress, images)


def reference_change(recipe: Recipe, h: torch.Tensor, progress: float, targets: list[int]) -> np.ndarray:
    """h' - h (B x C x H x W) by loops over pictures, positions and latents."""
    norm, classes = recipe.normalisation, range(len(recipe.classes))
    s = int(np.argmin(np.abs(norm.progress.numpy() - progress)))
    mean, scale = norm.mean[s].double().numpy(), float(norm.scale[s])
    encoder, decoder, levels = (x.double().numpy() for x in (recipe.encoder, recipe.decoder, recipe.levels[s]))
    rows = h.double().flatten(2).numpy()
    change = np.zeros_like(rows)
    for b, c in enumerate(targets):
        x = (rows[b] - mean[:, None]) / scale
        guess = np.exp(recipe.probe_weight[s].double().numpy() @ x.mean(axis=1) + recipe.probe_bias[s].double().numpy())
        guess /= guess.sum()
        strength = recipe.strength[c]
        for p in range(rows.shape[2]):
            for f in range(len(decoder)):
                level = [levels[k, f, min(p, levels.shape[2] - 1)] for k in classes]
                pre = encoder[f] @ x[:, p] + float(recipe.bias[f])
                z = pre if pre > float(recipe.threshold[f]) else 0.0
                new = {
                    "shift": z + strength * (level[c] - sum(guess[k] * level[k] for k in classes)),
                    "add": z + strength * (level[c] - np.mean([level[k] for k in classes if k != c])),
                    "move": z + strength * (level[c] - z),
                    "scale": (1 + strength * bool(recipe.member[c, f])) * z,
                }[recipe.mode]
                change[b, :, p] += scale * decoder[f] * (new - z)
    return change.reshape(h.shape)


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_steering_equals_editing_the_whole_latent_vector(toys, mode, progress):
    recipe, h = toys.recipe(mode=mode), toys.activations(pictures=8).values[1]
    before = h.clone()
    expected = reference_change(recipe, h, progress, TARGETS.tolist())
    found = steer(recipe, h, progress)
    np.testing.assert_allclose((found.double() - h.double()).numpy(), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1 and torch.equal(h, before) and found is not h


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_edited_with_fp32_maths(toys, mode, dtype):
    h = toys.activations(pictures=8).values[1].to(dtype)
    recipe = toys.recipe(mode=mode)
    # Decoder times scale is what it was, but alone each is beyond what fp16 can hold.
    recipe.decoder.mul_(1e6)
    recipe.normalisation.scale.div_(1e6)
    recipe.encoder.div_(1e6)
    recipe.probe_weight.div_(1e6)
    expected = torch.from_numpy(reference_change(recipe, h, 0.4, TARGETS.tolist()))
    found = steer(recipe, h)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * (h.double().abs() + expected.abs()) + 1e-6
    assert ((found.double() - h.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_returns_the_very_same_object(toys, mode):
    h = toys.activations(pictures=8).values[1]
    assert steer(toys.recipe(mode=mode, strength=(0.0, 0.0, 0.0)), h) is h


@pytest.mark.parametrize("mode", MODES)
def test_a_class_of_strength_zero_is_left_alone_beside_others(toys, mode):
    h = toys.activations(pictures=8).values[1]
    changed = (steer(toys.recipe(mode=mode, strength=(1.0, 0.0, 1.0)), h) - h).flatten(1).abs().amax(dim=1)
    assert (changed[TARGETS == 1] == 0).all() and (changed[TARGETS != 1] > 0).any()


@pytest.mark.parametrize(("progress", "same"), [(0.0, True), (0.29, True), (0.3, False), (0.6, False), (0.61, True)])
def test_steps_outside_start_and_end_return_the_very_same_object(toys, progress, same):
    h = toys.activations(pictures=8).values[1]
    assert (steer(toys.recipe(start=0.3, end=0.6), h, progress) is h) == same


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_eight_equals_eight_batches_of_one(toys, mode):
    recipe, h = toys.recipe(mode=mode), toys.activations(pictures=8).values[1]
    parts = [steer(recipe, h[i : i + 1], images=IMAGES[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(steer(recipe, h), torch.cat(parts), atol=1e-6, rtol=1e-6)
    order = torch.tensor([5, 0, 7, 7, 2])
    torch.testing.assert_close(steer(recipe, h[order], images=order), steer(recipe, h)[order], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_move_brings_every_latent_nearer_to_its_level_and_not_beyond(toys, strength):
    recipe = toys.recipe(mode="move", strength=(strength,) * 3)
    # With an orthonormal decoder the latents can be read back from the edited state.
    recipe.encoder.copy_(torch.eye(5, 6)), recipe.decoder.copy_(torch.eye(5, 6))
    recipe.bias.zero_(), recipe.threshold.zero_()
    h, norm = toys.activations(pictures=8).values[1].abs() * 5, recipe.normalisation
    before, after = (norm.apply(x, 1)[..., :5] for x in (h, steer(recipe, h)))
    level = recipe.levels[1].float()[TARGETS].transpose(1, 2)
    active = before > 0
    gap = (level - before.relu())[active]
    torch.testing.assert_close((level - after)[active], (1 - strength) * gap, atol=1e-4, rtol=0)


def test_shift_leaves_alone_what_already_heads_for_its_class(toys):
    recipe, h = toys.recipe(mode="shift", strength=(1.0,) * 3), toys.activations(pictures=8).values[1]
    recipe.probe_weight.zero_()
    recipe.probe_bias.copy_(torch.tensor([0.0, 50.0, 0.0]).expand(3, 3))
    changed = (steer(recipe, h) - h).flatten(1).abs().amax(dim=1)
    assert (changed[TARGETS == 1] < 1e-5).all() and (changed[TARGETS != 1] > 0.1).all()


def test_a_site_of_another_width_or_size_is_refused(toys):
    with pytest.raises(DiffLensError, match="is 7 wide, the recipe was made on 6"):
        steer(toys.recipe(), torch.zeros(8, 7, 2, 2))
    with pytest.raises(DiffLensError, match="has 9 positions, the recipe was made on 4"):
        steer(toys.recipe(), torch.zeros(8, 6, 3, 3))


def test_scale_works_at_any_size_as_the_refusal_promises(toys):
    recipe, h = toys.recipe(mode="scale"), toys.random(0)(8, 6, 3, 3)
    expected = reference_change(recipe, h, 0.4, TARGETS.tolist())
    np.testing.assert_allclose((steer(recipe, h) - h).double().numpy(), expected, atol=1e-5)
