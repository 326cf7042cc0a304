"""Every steering mode against loops that build the whole latent vector, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from difflens_core.activations import Shown
from difflens_core.experiments import causal_effect
from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.locate import LEVELS, Levels
from difflens_core.networks import sample, start_noise
from difflens_core.sae import Normalisation, SparseAutoencoder
from difflens_core.steer import (
    MODES,
    WITHOUT_LEVELS,
    Recipe,
    Steering,
    load_recipe,
    recipe_from_features,
    save_recipe,
    with_settings,
)
from difflens_core.steer.recipes import READING
from difflens_core.steer.steering import BY_LEVELS, kth_largest
from difflens_core.targets import LEFT_ALONE

TARGETS = torch.tensor([0, 1, 2, 2, 1, 0, 2, 1])
IMAGES = torch.arange(8)


def steer(recipe: Recipe, h: torch.Tensor, progress: float = 0.4, images: torch.Tensor = IMAGES, **more):
    return Steering(recipe, lambda i: TARGETS[i], **more)(h, progress, images)


def made_from(sae: SparseAutoencoder, recipe: Recipe) -> Recipe:
    """The recipe on latents of the SAE; its thresholds let nothing through."""
    rows = {"encoder": sae.encoder, "bias": sae.encoder_bias, "decoder": sae.decoder}
    features = torch.tensor([1, 4, 7, 11, 19])
    rows = {name: rows[name][features] for name in rows}
    return replace(recipe, features=features, threshold=torch.full((5,), 1e9), **rows)


def reference_change(
    recipe: Recipe, h: torch.Tensor, progress: float, targets: list[int], sae: SparseAutoencoder | None = None
) -> np.ndarray:
    """h' - h (B x C x H x W) by loops over pictures, positions and latents, through the whole `sae` if given."""
    norm, classes = recipe.normalisation, range(len(recipe.classes))
    s = int(np.argmin(np.abs(norm.progress.numpy() - progress)))
    mean, scale = norm.mean[s].double().numpy(), float(norm.scale[s])
    encoder, decoder, levels = (x.double().numpy() for x in (recipe.encoder, recipe.decoder, recipe.levels.dense()[s]))
    rows = h.double().flatten(2).numpy()
    change = np.zeros_like(rows)
    for b, c in enumerate(targets):
        x = (rows[b] - mean[:, None]) / scale
        guess = np.exp(recipe.probe_weight[s].double().numpy() @ x.mean(axis=1) + recipe.probe_bias[s].double().numpy())
        guess /= guess.sum()
        strength = recipe.strength[c]
        active = np.zeros((len(decoder), rows.shape[2]))
        for p in range(rows.shape[2]):
            for f in range(len(decoder)):
                pre = encoder[f] @ x[:, p] + float(recipe.bias[f])
                on = pre > float(recipe.threshold[f])
                if sae is not None:
                    every = sae.encoder.double().numpy() @ x[:, p] + sae.encoder_bias.double().numpy()
                    on = pre > 0 and recipe.features[f] in np.argsort(-every)[: sae.k]
                active[f, p] = pre if on else 0.0
        other = max((k for k in classes if k != c), key=lambda k: guess[k])
        if recipe.mode == "reach":
            gap = levels[c] - levels[other]
            way = min(1, float(((active - levels[other]) * gap).sum() / (gap**2).sum()))
        for p in range(rows.shape[2]):
            for f in range(len(decoder)):
                level = [levels[k, f, min(p, levels.shape[2] - 1)] if levels.shape[2] else 0.0 for k in classes]
                z, own = active[f, p], bool(recipe.member[c, f])
                difference = level[c] - np.mean([level[k] for k in classes if k != c])
                new = {
                    "reach": z + strength * (1 - way) * (level[c] - level[other]) if recipe.mode == "reach" else 0.0,
                    "shift": z + strength * (level[c] - sum(guess[k] * level[k] for k in classes)),
                    "add": z + strength * difference,
                    "add own": z + strength * difference * own,
                    "add fixed": z + (strength if own else -strength),
                    "add own fixed": z + strength * own,
                    "move": z + min(1, strength) * (level[c] - z),
                    "clamp": z + min(1, strength) * (min(z, level[c]) - z),
                    "scale": (1 + strength * own) * z,
                    "ablate": (1 - min(1, strength) * own) * z,
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


@pytest.mark.parametrize("mode", MODES)
def test_pictures_that_are_left_alone_stay_the_same_to_the_bit(toys, mode):
    recipe, h = toys.recipe(mode=mode), toys.random(31)(8, 6, 2, 2)
    steered, some = steer(recipe, h), torch.tensor([1, 4, 6])

    def target_of(images: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isin(images, some), LEFT_ALONE, TARGETS[images])

    found = Steering(recipe, target_of)(h, 0.4, IMAGES)
    others = ~torch.isin(IMAGES, some)
    assert torch.equal(found[some], h[some]) and torch.equal(found[others], steered[others])
    assert Steering(recipe, lambda images: torch.full_like(images, LEFT_ALONE))(h, 0.4, IMAGES) is h


@pytest.mark.parametrize(("progress", "same"), [(0.0, True), (0.29, True), (0.3, False), (0.6, False), (0.61, True)])
def test_steps_outside_start_and_end_return_the_very_same_object(toys, progress, same):
    h = toys.activations(pictures=8).values[1]
    assert (steer(toys.recipe(start=0.3, end=0.6), h, progress) is h) == same


def test_the_first_step_of_a_capture_that_began_late_is_steered(toys):
    """What a recipe says of its begin is rounded: 2/3 lies before 0.666667."""
    h = toys.activations(pictures=8).values[1]
    assert steer(toys.recipe(start=0.666667), h, 2 / 3) is not h


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_eight_equals_eight_batches_of_one(toys, mode):
    recipe, h = toys.recipe(mode=mode), toys.activations(pictures=8).values[1]
    parts = [steer(recipe, h[i : i + 1], images=IMAGES[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(steer(recipe, h), torch.cat(parts), atol=1e-6, rtol=1e-6)
    order = torch.tensor([5, 0, 7, 7, 2])
    torch.testing.assert_close(steer(recipe, h[order], images=order), steer(recipe, h)[order], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_move_brings_every_latent_nearer_to_its_level_and_not_beyond(toys, strength):
    recipe = toys.recipe(mode="move", strength=(strength,) * 3)
    # With an orthonormal decoder the latents can be read back from the edited state.
    recipe.encoder.copy_(torch.eye(5, 6)), recipe.decoder.copy_(torch.eye(5, 6))
    recipe.bias.zero_(), recipe.threshold.zero_()
    h, norm = toys.activations(pictures=8).values[1].abs() * 5, recipe.normalisation
    before, after = (norm.apply(x, 1)[..., :5] for x in (h, steer(recipe, h)))
    level = recipe.levels.dense()[1][TARGETS].transpose(1, 2)
    active = before > 0
    gap = (level - before.relu())[active]
    torch.testing.assert_close((level - after)[active], max(0, 1 - strength) * gap, atol=1e-4, rtol=0)


@pytest.mark.parametrize("come", [0.0, 0.3, 1.0, 1.7])
def test_reach_goes_the_rest_of_the_way_and_not_beyond(come):
    """Latents that have come part of the way between two classes' levels, which differ at every position."""
    levels = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    recipe = Recipe(
        "look", ("a", "b"), "site", "", torch.arange(3), torch.eye(3), torch.zeros(3), torch.zeros(3), torch.eye(3),
        torch.ones(2, 3, dtype=torch.bool), Levels.of(levels), torch.zeros(1, 2, 3), torch.zeros(1, 2),
        Normalisation(torch.zeros(1), torch.zeros(1, 3), torch.ones(1)), "reach", (1.0, 1.0),
    )  # fmt: skip
    start, end = levels[0]
    z = torch.lerp(start, end, come)
    found = Steering(recipe, lambda images: torch.ones_like(images))(z.reshape(1, 3, 2, 2), 0.5, torch.zeros(1).long())
    torch.testing.assert_close(found.reshape(3, 4), torch.lerp(start, end, max(come, 1.0)))


def test_shift_leaves_alone_what_already_heads_for_its_class(toys):
    recipe, h = toys.recipe(mode="shift", strength=(1.0,) * 3), toys.activations(pictures=8).values[1]
    recipe.probe_weight.zero_()
    recipe.probe_bias.copy_(torch.tensor([0.0, 50.0, 0.0]).expand(3, 3))
    changed = (steer(recipe, h) - h).flatten(1).abs().amax(dim=1)
    assert (changed[TARGETS == 1] < 1e-5).all() and (changed[TARGETS != 1] > 0.1).all()


def test_a_site_of_another_width_is_refused(toys):
    with pytest.raises(DiffLensError, match="is 7 wide, the recipe was made on 6"):
        steer(toys.recipe(), torch.zeros(8, 7, 2, 2))


@pytest.mark.parametrize("size", [(3, 3), (4, 2), (1, 3)])
@pytest.mark.parametrize("mode", ["reach", "shift", "add", "move"])
def test_on_a_map_of_another_size_the_levels_are_stretched_as_a_picture_would_be(toys, mode, size):
    recipe = replace(toys.recipe(mode=mode), levels=toys.levels())
    h = toys.random(0)(8, 6, *size)

    def resized(maps):  # ... x 4, maps of 2 x 2, by Pillow's own resampling, a map at a time
        rows = [
            np.asarray(Image.fromarray(row.reshape(2, 2).float().numpy()).resize(size[::-1], Image.Resampling.BILINEAR))
            for row in maps.reshape(-1, 4)
        ]
        return torch.from_numpy(np.stack(rows)).reshape(*maps.shape[:-1], -1).to(maps.dtype)

    levels = recipe.levels
    dense = replace(levels, maps=resized(levels.maps @ levels.places), places=torch.eye(size[0] * size[1]))
    own = replace(recipe, levels=dense, map=size)
    steering = Steering(recipe, lambda i: TARGETS[i])
    said = f"a map of 2 x 2, and was stretched to {size[0]} x {size[1]}"
    assert said in steering.stretch(h) and Steering(own, steering.target_of).stretch(h) == ""
    found = steering(h, 0.4, IMAGES)
    torch.testing.assert_close(found, steer(own, h), atol=2e-2, rtol=1e-2)
    assert torch.equal(found, steering(h, 0.4, IMAGES)) and float((found - h).abs().max()) > 0.1


@pytest.mark.parametrize("mode", WITHOUT_LEVELS)
def test_modes_without_levels_work_at_any_size_as_the_refusal_promises(toys, mode):
    recipe, h = toys.recipe(mode=mode), toys.random(0)(8, 6, 3, 3)
    expected = reference_change(recipe, h, 0.4, TARGETS.tolist())
    np.testing.assert_allclose((steer(recipe, h) - h).double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", READING)
def test_with_the_sae_a_latent_counts_only_where_it_is_among_the_k(toys, mode):
    sae, h = toys.sae(), toys.activations(pictures=8).values[1]
    recipe = made_from(sae, toys.recipe(mode=mode))
    expected = reference_change(recipe, h, 0.4, TARGETS.tolist(), sae)
    found = steer(recipe, h, sae=sae)
    np.testing.assert_allclose((found.double() - h.double()).numpy(), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1 and not torch.allclose(found, steer(recipe, h))


@pytest.mark.parametrize("with_sae", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_map_is_steered_like_one_wide_position(toys, mode, with_sae):
    """The loops of the 1x1 case check it on h as B x (C H W) x 1 x 1, every channel's mean repeated."""
    sae, h = toys.sae(width=24), toys.activations(pictures=8).values[1]
    recipe = made_from(sae, toys.recipe(width=24, positions=1, mode=mode))
    recipe = recipe if with_sae else replace(recipe, threshold=torch.full((5,), 0.2))
    norm = toys.normalisation()
    spread = replace(norm, mean=norm.mean[:, :, None].expand(-1, -1, 4).flatten(1))
    flat, sae = replace(recipe, normalisation=spread), sae if with_sae else None
    expected = reference_change(flat, h.flatten(1)[:, :, None, None], 0.4, TARGETS.tolist(), sae).reshape(h.shape)
    recipe = replace(recipe, normalisation=norm)
    found = steer(recipe, h, sae=sae and replace(sae, normalisation=norm, kernel=2))
    np.testing.assert_allclose((found - h).double().numpy(), expected, atol=1e-5)
    half = steer(recipe, h, sae=sae, mask=torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    torch.testing.assert_close(half[..., 0, 0], found[..., 0, 0]) and torch.equal(half[..., 0, 1], h[..., 0, 1])
    assert np.abs(expected).max() > 0.1 and not torch.equal(half[..., 1, 1], h[..., 1, 1])


@pytest.mark.parametrize("mode", ["shift", "scale"])
def test_a_map_of_another_size_than_the_whole_one_is_refused(toys, mode):
    recipe = replace(toys.recipe(width=24, positions=1, mode=mode), normalisation=toys.normalisation())
    with pytest.raises(DiffLensError, match="map at middle is 3 x 2, the recipe reads all of a 2 x 2 one"):
        steer(recipe, torch.zeros(8, 6, 3, 2))


def test_the_full_sae_is_read_in_chunks_with_the_same_result(toys, monkeypatch):
    sae, h = toys.sae(), toys.activations(pictures=8).values[1]
    recipe = made_from(sae, toys.recipe(mode="scale"))
    whole = steer(recipe, h, sae=sae)
    monkeypatch.setattr("difflens_core.steer.steering.CHUNK", 3 * sae.latents)
    torch.testing.assert_close(steer(recipe, h, sae=sae), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(1024, 32), (1024, 1), (1024, 33), (1000, 5), (64, 2), (20, 20)])
def test_kth_largest_equals_sorting(toys, n, k):
    rows = toys.random(n + k)(50, n).mul(4).round()  # with many ties
    assert torch.equal(kth_largest(rows, k), rows.sort(dim=1, descending=True).values[:, k - 1 : k])


@pytest.mark.parametrize("mode", WITHOUT_LEVELS)
def test_a_recipe_of_chosen_latents_needs_neither_probes_nor_levels(toys, mode):
    sae, h = toys.sae(), toys.activations(pictures=8).values[1]
    features = {"young": [3, 8], "adult": [0], "senior": [8, 12, 17]}
    recipe = recipe_from_features(sae, "age", features, mode, (0.5, 0.3, 2.0))
    found = steer(recipe, h, sae=sae)
    norm, own = sae.normalisation, [*features.values()]
    latents = sae.encode(h, 1)
    z = torch.zeros(8, 4, 20).scatter_(-1, latents.indices, latents.values)
    change = torch.zeros_like(z)
    for b, c in enumerate(TARGETS.tolist()):
        strength = (0.5, 0.3, 2.0)[c]
        for n in {n for numbers in own for n in numbers}:
            change[b, :, n] = {
                "add fixed": torch.full((4,), strength if n in own[c] else -strength),
                "add own fixed": torch.full((4,), strength * (n in own[c])),
                "scale": strength * (n in own[c]) * z[b, :, n],
                "ablate": -min(1, strength) * (n in own[c]) * z[b, :, n],
            }[mode]
    expected = h + (change @ sae.decoder * norm.scale[1]).transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_sae_or_latents_that_do_not_fit_are_refused(toys):
    recipe = made_from(toys.sae(), toys.recipe())
    for other in (toys.sae(seed=9), toys.sae(latents=10), toys.sae(width=7)):
        with pytest.raises(DiffLensError, match="was made from another SAE"):
            steer(recipe, toys.activations(pictures=8).values[1], sae=other)
    for numbers in ([], [20], [-1]):
        with pytest.raises(DiffLensError, match="latents 0 to 19"):
            recipe_from_features(toys.sae(), "age", {"young": numbers})


def test_a_recipe_without_levels_or_thresholds_is_not_asked_for_them(toys):
    recipe = recipe_from_features(toys.sae(), "age", {"young": [1], "old": []}, "add fixed")
    for mode in set(MODES) - set(WITHOUT_LEVELS):
        with pytest.raises(DiffLensError, match=f"mode '{mode}' needs class levels"):
            with_settings(recipe, mode=mode)
    for mode, what in (("amplify", "class levels"), ("ablate", "thresholds")):
        with pytest.raises(DiffLensError, match=f"to {mode} its features, .* needs {what}"):
            causal_effect(recipe, None, lambda images: images, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_mask_weighs_the_edit_position_by_position(toys, mode):
    recipe, h = toys.recipe(mode=mode), toys.activations(pictures=8).values[1]
    full = steer(recipe, h) - h
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4], mask[:, 4:, 4:6] = 1.0, 1.0  # the site's map is 2 x 2: left top all, right bottom half
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    found = steer(recipe, h, mask=mask)
    torch.testing.assert_close(found - h, full * weight, atol=1e-5, rtol=0)
    assert torch.equal(found[..., 0, 1], h[..., 0, 1]) and torch.equal(found[..., 1, 0], h[..., 1, 0])


def test_each_picture_has_its_own_mask_if_there_are_several(toys):
    recipe, h = toys.recipe(), toys.activations(pictures=8).values[1]
    mask = torch.stack([torch.full((2, 2), float(picture != 3)) for picture in range(7)])
    order = torch.tensor([3, 6, 0])
    found, full = steer(recipe, h[order], images=order, mask=mask), steer(recipe, h[order], images=order)
    assert torch.equal(found[0], h[3]) and torch.equal(found[1:], full[1:]) and not torch.equal(full[0], h[3])
    with pytest.raises(DiffLensError, match="there are 6 masks and at least 7 pictures"):
        steer(recipe, h[order], images=order, mask=mask[:6])


@pytest.mark.parametrize("mode", ["reach", "shift", "add", "add own", "move", "clamp"])
def test_levels_go_by_what_else_a_picture_shows(toys, mode):
    """As a recipe whose levels are, picture by picture, those of its traits; without traits nothing is different."""
    plain, levels, h = toys.recipe(mode=mode, start=0.0), toys.levels(), toys.activations(pictures=8).values[1]
    found = steer(replace(plain, levels=levels), h, progress=0.34)
    x = (h.mean(dim=(2, 3)) - plain.normalisation.mean[1]) / plain.normalisation.scale[1]
    logits = torch.nn.functional.linear(x, levels.weight[1], levels.bias[1])
    u = torch.cat([logits[:, :2].softmax(1) - 1 / 2, logits[:, 2:].softmax(1) - 1 / 3], dim=1)
    more = torch.einsum("bg,kgr,rfp->bkfp", u, levels.effects[1], levels.maps)
    for b in range(8):
        own = replace(plain, levels=Levels.of(plain.levels.dense() + more[b]))
        torch.testing.assert_close(found[b], steer(own, h, progress=0.34)[b], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, steer(plain, h, progress=0.34), atol=1e-2)
    silent = replace(levels, weight=0 * levels.weight, bias=0 * levels.bias)
    torch.testing.assert_close(steer(replace(plain, levels=silent), h), steer(plain, h))


@pytest.mark.parametrize("mode", MODES)
def test_what_else_a_picture_shows_is_read_where_it_is_shown(toys, mode):
    recipe = replace(toys.recipe(mode=mode), levels=toys.levels())
    h, last = (toys.activations(pictures=8, seed=seed).values[1] for seed in (2, 4))
    steering = Steering(recipe, lambda i: TARGETS[i])
    t = steering.tensors(h.device)
    traits = recipe.levels.traits(recipe.normalisation.apply(last, 2).mean(dim=1), 2) if mode in BY_LEVELS else None
    expected = h + steering.change(h, TARGETS, traits, 1, t, IMAGES)
    found = steering(h, 1 / 3, IMAGES, Shown(last, 2 / 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (float((found - steer(recipe, h, 1 / 3)).abs().max()) > 0.01) == (mode in BY_LEVELS)


def test_pictures_held_do_not_depend_on_their_batch_and_those_left_alone_stay_to_the_bit(toys):
    recipe, model = toys.recipe(features=20, width=32, positions=4, hold=True), toys.denoiser()
    recipe = replace(recipe, site="middle_block", strength=(9.0, 9.0, 9.0))
    noise, targets = start_noise(6, 1, 16), torch.tensor([0, LEFT_ALONE, 1, 2, LEFT_ALONE, 2])

    def drawn(recipe, images):
        return sample(model, noise[images], 4, [Steering(recipe, lambda i: targets[i])], images)

    whole, plain = drawn(recipe, torch.arange(6)), sample(model, noise, 4)
    single = torch.cat([drawn(recipe, torch.tensor([i])) for i in range(6)])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=1e-4)
    alone = targets == LEFT_ALONE
    assert torch.equal(whole[alone], plain[alone]) and not torch.equal(whole[~alone], plain[~alone])
    free = drawn(replace(recipe, hold=False), torch.arange(6))
    assert float((whole - free)[~alone].abs().max()) > 1e-3
    nothing = with_settings(recipe, strength=0.0)
    assert not Steering(nothing, lambda i: targets[i]).holds and torch.equal(drawn(nothing, torch.arange(6)), plain)


def test_levels_are_read_as_they_were_written(toys, tmp_path):
    recipe = replace(toys.recipe(), levels=toys.levels())
    save_recipe(tmp_path / "r.safetensors", recipe)
    loaded = load_recipe(tmp_path / "r.safetensors").levels
    assert loaded.attributes == recipe.levels.attributes
    for name in LEVELS:
        expected = getattr(recipe.levels, name)
        torch.testing.assert_close(getattr(loaded, name), expected, atol=float(expected.abs().max()) / 253, rtol=0)
    bad = replace(recipe, levels=replace(recipe.levels, maps=torch.ones(11, 5, 3)))
    save_recipe(tmp_path / "bad.safetensors", replace(bad, bias=torch.ones(4)))
    with pytest.raises(DiffLensError, match=r"bias has shape \(4,\), expected 5"):
        load_recipe(tmp_path / "bad.safetensors")
    save_recipe(tmp_path / "bad.safetensors", replace(recipe, levels=replace(recipe.levels, maps=torch.ones(3, 5, 4))))
    with pytest.raises(DiffLensError, match="levels.classes has shape"):
        load_recipe(tmp_path / "bad.safetensors")


def test_levels_of_older_files_are_read(toys, tmp_path):
    """0.4 wrote a level for each step, class and position."""
    recipe = toys.recipe()
    save_recipe(tmp_path / "new.safetensors", recipe)
    tensors, info = load_tensors(tmp_path / "new.safetensors", "recipe")
    for name in [name for name in tensors if name.startswith("levels.")]:
        del tensors[name]
    tensors["levels"] = recipe.levels.dense().half()
    del info["traits"]
    for name in ("encoder", "decoder", "probe_weight"):
        tensors[name] = getattr(recipe, name).half()
        del tensors[f"{name}.unit"]
    save_tensors(tmp_path / "old.safetensors", "recipe", tensors, info)
    h = toys.activations(pictures=8).values[1]
    old = load_recipe(tmp_path / "old.safetensors")
    torch.testing.assert_close(steer(old, h), steer(recipe, h), atol=5e-3, rtol=5e-3)
    assert not old.levels.attributes


def test_steering_gives_the_same_when_decoded_maps_are_kept_and_when_they_are_too_large(toys, monkeypatch):
    recipe, h = replace(toys.recipe(), levels=toys.levels()), toys.activations(pictures=8).values[1]
    kept = Steering(recipe, lambda i: TARGETS[i])
    first = [kept(h, at, IMAGES) for at in (0.0, 0.4, 0.7)]
    assert all(torch.equal(kept(h, at, IMAGES), x) for at, x in zip((0.0, 0.4, 0.7), first, strict=True))
    assert len(kept._decoded) == 1
    monkeypatch.setattr("difflens_core.steer.steering.CACHE_BYTES", 8)
    small = Steering(recipe, lambda i: TARGETS[i])
    for at, x in zip((0.0, 0.4, 0.7), first, strict=True):
        torch.testing.assert_close(small(h, at, IMAGES), x)
    assert not small._decoded


def at_site(toys, site: str, seed: int, positions: int) -> Steering:
    width = {"middle_block": 32, "decoder.0": 16}[site]
    recipe = toys.recipe(width=width, steps=4, seed=seed, positions=positions, strength=(5.0,) * 3)
    return Steering(replace(recipe, site=site, mode="move"), lambda i: i % 3)


def test_recipes_at_one_site_and_at_two_compose_in_order(toys):
    """One network pass by hand against sampling with three steerings, two at the same site."""
    model, noise = toys.denoiser(), start_noise(4, 3, 16)
    first, second, later = (
        at_site(toys, *how) for how in (("middle_block", 5, 4), ("middle_block", 6, 4), ("decoder.0", 7, 16))
    )
    images = torch.arange(4)
    h, emb = model.encode(noise, torch.ones(4))
    h = second(first(model.middle_block(h, emb), 0.0, images), 0.0, images)
    h = torch.pixel_shuffle(model.up(model.after_middle(h, emb)), 2)
    h = model.decoder[1](later(model.decoder[0](h, emb), 0.0, images), emb)
    x0 = torch.pixel_shuffle(model.conv_out(torch.nn.functional.silu(model.norm_out(h))), 4).clamp(-1, 1)
    found = sample(model, noise, 1, [first, second, later])
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
    for fewer in ([second, first, later], [first, later], [first, second]):
        assert not torch.allclose(sample(model, noise, 1, fewer), found, atol=1e-3)


def test_an_encoder_that_is_told_the_time_reads_what_one_of_that_step_would(toys, tmp_path):
    recipe, h = toys.recipe(mode="scale"), toys.activations(pictures=8).values[1]
    modulation = toys.random(21)(3, 2, 6)
    told = replace(recipe, normalisation=replace(recipe.normalisation, modulation=modulation))
    save_recipe(tmp_path / "r.safetensors", told)
    for step, progress in enumerate(recipe.normalisation.progress.tolist()):
        gain, offset = modulation[step]
        own = replace(recipe, encoder=recipe.encoder * (1 + gain), bias=recipe.bias + recipe.encoder @ offset)
        expected = steer(own, h, progress)
        torch.testing.assert_close(steer(told, h, progress), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, steer(recipe, h, progress), atol=1e-3)
    assert torch.equal(load_recipe(tmp_path / "r.safetensors").normalisation.modulation, modulation)


def test_what_is_held_outside_main_memory_is_given_back(toys):
    steering, away = Steering(toys.recipe(), lambda i: TARGETS[i]), torch.device("meta")
    h = toys.activations(pictures=8).values[1]
    before = steering(h, 0.4, IMAGES)
    larger = steering.sized(F.interpolate(h, scale_factor=2))
    for one in (steering, larger):
        t = one.tensors(away)
        one.levels(away), one.decoded_maps(t)
        assert away in one._moved and away in one._levels and away in one._decoded
    steering.release()
    for one in (steering, larger):
        assert away not in {*one._moved, *one._levels, *one._decoded}
    assert torch.device("cpu") in steering._moved and torch.equal(steering(h, 0.4, IMAGES), before)
