"""Recipes of several sites: joined, stored, and steered with together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.experiments import causal_effect, diagnose
from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.networks import sample, start_noise
from difflens_core.steer import (
    Steering,
    as_stored,
    at_dose,
    joined,
    load_recipe,
    recipe_from_features,
    save_recipe,
    steerings,
    weigh_latents,
    with_settings,
)

SITES = ("down_blocks.0", "middle_block", "up_blocks.0")


@pytest.fixture
def parts(toys):
    """A recipe for each of three sites, of other latents and another number of them."""
    return [
        replace(toys.recipe(features=3 + number, seed=number, start=0.1 * number, end=1 - 0.1 * number), site=site)
        for number, site in enumerate(SITES)
    ]


def test_a_joined_recipe_has_the_settings_of_the_first_and_acts_where_all_do(parts):
    whole = joined(replace(parts[0], hold=True, strength=(0.5, 0.25, 1.0)), *parts[1:])
    assert whole.sites == SITES and (whole.start, whole.end, whole.hold) == (0.2, 0.8, False)
    for part, own in zip(whole.parts, parts, strict=True):
        assert torch.equal(part.encoder, own.encoder) and part.site == own.site and not part.further
        assert (part.strength, part.start, part.end) == ((0.5, 0.25, 1.0), 0.2, 0.8)
    changed = with_settings(at_dose(whole, 2.0), mode="move", start=0.5)
    assert all((p.strength, p.mode, p.start) == ((1.0, 0.5, 2.0), "move", 0.5) for p in changed.parts)


def test_joining_in_turn_or_at_once_is_the_same(parts):
    once, in_turn = joined(*parts), joined(joined(*parts[:2]), parts[2])
    assert once.sites == in_turn.sites and (once.start, once.end) == (in_turn.start, in_turn.end)


def test_steering_by_it_is_steering_at_every_site(toys):
    model = toys.denoiser()
    recipes = [
        replace(toys.recipe(width=32, seed=seed), site=site)
        for seed, site in enumerate(("middle_block", "after_middle"))
    ]
    edits = steerings(joined(*recipes), lambda images: images % 3)
    assert [edit.site for edit in edits] == ["middle_block", "after_middle"]
    by_one = [Steering(recipe, lambda images: images % 3) for recipe in recipes]
    found, expected, first = (sample(model, start_noise(4, 0, 16), 3, some) for some in (edits, by_one, by_one[:1]))
    assert torch.equal(found, expected) and not torch.equal(found, first)


def test_a_file_holds_all_sites(parts, tmp_path):
    whole, path = joined(*parts), tmp_path / "r.safetensors"
    save_recipe(path, whole)
    found, rounded = load_recipe(path), as_stored(whole)
    assert found.sites == SITES
    for one, other in zip(found.parts, rounded.parts, strict=True):
        for name in ("features", "encoder", "decoder", "threshold", "member", "probe_weight"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.info == other.info and one.strength == other.strength


def test_a_file_whose_sites_do_not_fit_is_refused(parts, tmp_path):
    path = tmp_path / "r.safetensors"
    save_recipe(path, joined(*parts))
    tensors, info = load_tensors(path, "recipe")
    for change, told in (
        ({"site": SITES[0]}, "two recipes for age are of down_blocks.0"),
        ({"classes": ["a", "b", "c"]}, "cannot be joined"),
        ({"model": "other"}, "different weights"),
    ):
        further = [info["further"][0] | change, info["further"][1]]
        save_tensors(path, "recipe", tensors, info | {"further": further})
        with pytest.raises(DiffLensError, match=told):
            load_recipe(path)
    save_tensors(path, "recipe", tensors, info | {"further": [{}, info["further"][1]]})
    with pytest.raises(DiffLensError, match="does not tell attribute of one of its sites"):
        load_recipe(path)
    save_tensors(path, "recipe", {n: t for n, t in tensors.items() if n != "1/threshold"}, info)
    with pytest.raises(DiffLensError, match="lacks threshold"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attribute": "hair"}, r"recipes for age \(.*\) and hair"),
        ({"model": "xyz"}, "at down_blocks.0 and middle_block were made on different weights"),
        ({"site": SITES[0]}, "two recipes for age are of down_blocks.0"),
    ],
)
def test_recipes_that_do_not_belong_together_are_refused(parts, change, told):
    with pytest.raises(DiffLensError, match=told):
        joined(parts[0], replace(parts[1], **change))


def test_a_mode_that_one_of_the_sites_cannot_have_is_refused(toys, parts):
    bare = recipe_from_features(toys.sae(), "age", {name: [1] for name in parts[0].classes})
    bare = replace(bare, site="elsewhere", model=parts[0].model)
    whole = joined(bare, parts[0])
    assert whole.needs_sae and whole.mode == "scale"
    with pytest.raises(DiffLensError, match="needs class levels"):
        with_settings(whole, mode="shift")


def test_the_sae_of_one_site_serves_that_one(toys, parts):
    sae = toys.sae()
    features = {name: [number] for number, name in enumerate(parts[0].classes)}
    own = replace(recipe_from_features(sae, "age", features), model=parts[0].model)
    whole = joined(own, replace(parts[1], strength=own.strength))
    edits = steerings(whole, torch.Tensor.long, sae)
    assert [edit.sae for edit in edits] == [sae, None]
    with pytest.raises(DiffLensError, match="the SAE is of elsewhere"):
        steerings(whole, torch.Tensor.long, replace(sae, site="elsewhere"))


def test_what_looks_at_the_latents_of_one_site_says_so(parts):
    whole = joined(*parts)
    for look in (
        lambda: causal_effect(whole, None, None),
        lambda: diagnose(whole, None, None),
    ):
        with pytest.raises(DiffLensError, match="is of several sites"):
            look()
    weighed = weigh_latents(whole, None, None, torch.zeros(4, 1))
    assert weighed.info["weighed"]["why"] == "the recipe is of 3 sites" and weighed.weight is None
