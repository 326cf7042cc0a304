"""The effect of single latents against editing them one by one through the steering modes and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from difflens_core.activations import Drawer
from difflens_core.experiments import EFFECTS, Effects, causal_effect, keep_effective
from difflens_core.experiments.effects import OneLatent
from difflens_core.files import DiffLensError
from difflens_core.networks import DenoiserSampler, start_noise
from difflens_core.report import effect_table
from difflens_core.steer import Steering

PICTURES = 5


def classify(images: torch.Tensor) -> torch.Tensor:
    """Three classes, read off the mean of the colours."""
    return (images.mean(dim=(1, 2)) * 30).softmax(dim=1)


@pytest.fixture(scope="module")
def setup(toys):
    """A recipe for the middle block of a small denoiser, and how to draw with it."""
    recipe = replace(toys.recipe(width=32, steps=4, strength=(1.0,) * 3), site="middle_block")
    return recipe, Drawer(DenoiserSampler(toys.denoiser(), 4), start_noise(PICTURES, 1, 16))


def test_ablation_equals_steering_that_ablates_one_latent(setup):
    recipe, draw = setup
    found = causal_effect(recipe, draw, classify, PICTURES, "ablate", batch=7)
    everything = torch.arange(PICTURES)
    plain = classify(draw([], everything))
    for f in range(5):
        member = torch.zeros(3, 5, dtype=torch.bool)
        member[:, f] = True
        alone = Steering(replace(recipe, mode="ablate", member=member), torch.zeros_like)
        change = (classify(draw([alone], everything)) - plain).double().numpy()
        np.testing.assert_allclose(found.effect[f].numpy(), change.mean(axis=0), atol=1e-5)
        margin = stats.t.ppf(0.975, PICTURES - 1) * change.std(axis=0, ddof=1) / PICTURES**0.5
        np.testing.assert_allclose(found.margin[f].numpy(), margin, atol=1e-5)
    assert float(found.effect.abs().max()) > 1e-3 and found.features.tolist() == [0, 1, 2, 3, 4]


def test_ablating_a_latent_of_a_whole_map_equals_steering_too(toys):
    recipe, h = toys.recipe(width=24, positions=1, strength=(1.0,) * 3), toys.activations(pictures=5).values[1]
    recipe = replace(recipe, normalisation=toys.normalisation())
    found = OneLatent(recipe, torch.arange(5), "ablate")(h, 0.4, torch.arange(5))
    for f in range(5):
        alone = replace(recipe, mode="ablate", member=(torch.arange(5) == f).expand(3, 5))
        expected = Steering(alone, torch.zeros_like)(h[f : f + 1], 0.4, torch.zeros(1, dtype=torch.int64))
        torch.testing.assert_close(found[f], expected[0], atol=1e-5, rtol=0)
    assert not torch.equal(found, h)


def test_amplifying_adds_what_the_strongest_class_has_more_of(toys):
    recipe, h = toys.recipe(), toys.activations(pictures=5).values[1]
    found = OneLatent(recipe, torch.tensor([0, 3, -1, 4, 3]), "amplify", 2.0)(h, 0.4, torch.arange(5))
    for b, f in enumerate([0, 3, None, 4, 3]):
        expected = h[b].clone()
        if f is not None:
            levels = recipe.levels.dense()[:, :, f]
            c = int(levels.mean(dim=(0, 2)).argmax())
            extra = levels[1, c] - levels[1, [k for k in range(3) if k != c]].mean(dim=0)
            expected += (recipe.normalisation.scale[1] * recipe.decoder[f][:, None] * 2 * extra).view(6, 2, 2)
        torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", EFFECTS)
def test_the_batch_size_changes_nothing(setup, mode):
    recipe, draw = setup
    done = []
    whole = causal_effect(recipe, draw, classify, PICTURES, mode, batch=100, on_picture=lambda *x: done.append(x))
    told = []
    cut = causal_effect(recipe, draw, classify, PICTURES, mode, batch=3, on_found=told.append)
    assert [len(effects.features) for effects in told] == list(range(1, len(recipe.features) + 1))
    for effects in told:
        torch.testing.assert_close(effects.effect, cut.effect[: len(effects.features)])
        torch.testing.assert_close(effects.margin, cut.margin[: len(effects.features)])
    torch.testing.assert_close(whole.effect, cut.effect, atol=1e-5, rtol=0)
    assert done == [(30, 30)] and float(whole.effect.abs().max()) > 1e-3


def test_the_recipes_part_of_the_sampling_is_kept_to(toys):
    recipe, h = toys.recipe(start=0.5), toys.activations(pictures=2).values[1]
    edit = OneLatent(recipe, torch.tensor([0, 1]), "amplify")
    assert edit(h, 0.4, torch.arange(2)) is h and edit(h, 0.5, torch.arange(2)) is not h


def test_pairs_without_a_face_do_not_count(setup):
    """In pictures 1 and 3 as they are, and in picture 0 with latent 2 changed, no face is found."""
    recipe, draw = setup
    calls = []

    def classify_faces(images):
        missing = (1, 3) if not calls else (0,) if len(calls) == 3 else ()
        calls.append(len(images))
        return classify(images).index_fill(0, torch.tensor(missing, dtype=torch.int64), torch.nan)

    found = causal_effect(recipe, draw, classify_faces, PICTURES, "ablate", batch=PICTURES)
    everything = torch.arange(PICTURES)
    plain = classify(draw([], everything))
    for f in range(5):
        counted = [2, 4] if f == 2 else [0, 2, 4]
        after = classify(draw([OneLatent(recipe, torch.full((PICTURES,), f), "ablate")], everything))
        change = (after - plain).double().numpy()[counted]
        np.testing.assert_allclose(found.effect[f].numpy(), change.mean(axis=0), atol=1e-5)
        margin = stats.t.ppf(0.975, len(counted) - 1) * change.std(axis=0, ddof=1) / len(counted) ** 0.5
        np.testing.assert_allclose(found.margin[f].numpy(), margin, atol=1e-5)
    assert found.uncounted == 5 * 2 + 1 and "In 11 of 25 pairs" in effect_table(found, recipe)
    with pytest.raises(DiffLensError, match="fewer than two of 5 unsteered pictures show a face"):
        causal_effect(recipe, draw, lambda images: classify(images) * torch.nan, PICTURES)


def test_a_recipe_with_fewer_features_is_not_the_one_that_was_calibrated(toys):
    recipe = replace(toys.recipe(), info={"calibration": {"ask": [1, 0, 0]}, "pictures": 3})
    effect = torch.rand(5, 3)
    kept = keep_effective(recipe, Effects(recipe.features, effect, effect, "amplify", 8), 1)
    members = effect.masked_fill(~recipe.member.T, -torch.inf).amax(dim=1)
    scores = members[torch.isin(recipe.features, kept.features)].tolist()
    assert kept.info["scores"] == pytest.approx(scores)
    assert kept.info == {"pictures": 3, "ranking": "amplify, 8 pictures a feature", "scores": kept.info["scores"]}


def test_only_the_most_effective_members_of_each_class_are_kept(toys):
    member = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    recipe = replace(toys.recipe(), member=member)
    effect = torch.tensor([[0.3, 0, 0], [0.1, 0.2, 0], [0.2, 0, 0], [0.9, 0.1, 0], [0, 0, -0.5]])
    kept = keep_effective(recipe, Effects(recipe.features, effect, effect, "amplify", 8), 2)
    assert kept.features.tolist() == [0, 1, 2, 3, 4]
    assert kept.member.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    one = keep_effective(recipe, Effects(recipe.features, effect, effect, "amplify", 8), 1)
    assert one.features.tolist() == [0, 1, 4] and one.member.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for name in ("encoder", "bias", "threshold", "decoder"):
        assert torch.equal(getattr(one, name), getattr(recipe, name)[[0, 1, 4]])
    assert torch.equal(one.levels.maps, recipe.levels.maps[:, [0, 1, 4]]) and one.info["ranking"].startswith("amplify")
    ablated = keep_effective(recipe, Effects(recipe.features, -effect, effect, "ablate", 8), 1)
    assert ablated.features.tolist() == [0, 1, 4]


def test_what_cannot_be_measured_is_refused(setup):
    recipe, draw = setup
    with pytest.raises(DiffLensError, match="mode 'swap' is unknown"):
        causal_effect(recipe, draw, classify, PICTURES, "swap")
    with pytest.raises(DiffLensError, match="expected at least 2"):
        causal_effect(recipe, draw, classify, 1)


def test_it_can_be_cancelled(setup):
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        causal_effect(*setup, classify, PICTURES, on_picture=cancel)
