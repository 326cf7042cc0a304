"""Weights of latents against brute force: what they solve, and what they foresee of the pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from difflens_core.activations import Leaf
from difflens_core.classifiers import NO_CLASS
from difflens_core.classifiers.readings import NO_FACE
from difflens_core.networks import DenoiserSampler, start_noise
from difflens_core.report import weighing_text
from difflens_core.steer import Steering, load_recipe, save_recipe, weigh_latents
from difflens_core.steer.weighing import KEEP, PICTURE, SPARE, Products, add, log_odds, random_signs, read_classes

CLASSES = {"age": ("young", "adult", "senior"), "hair": ("short", "long"), "tone": ("a", "b", "c")}


class Linear:
    """Reads attributes off pictures by fixed linear maps of how they differ from `usual`; some show no face."""

    def __init__(self, usual: torch.Tensor, faceless: tuple[int, ...] = ()):
        draw = torch.Generator().manual_seed(11)
        self.attributes, self.usual, self.faceless = CLASSES, usual, faceless
        self.weights = {name: 20 * torch.randn(len(c), 3 * 16 * 16, generator=draw) for name, c in CLASSES.items()}

    def log_probabilities(self, images):
        seen = (images - self.usual).flatten(1)
        read = {name: F.linear(seen, w).log_softmax(dim=1) for name, w in self.weights.items()}
        missing = torch.zeros(len(images))
        missing[[i for i in self.faceless if i < len(images)]] = 1
        return read | ({NO_FACE: missing} if self.faceless else {})

    def classify(self, images):
        read = self.log_probabilities(images)
        return {name: value if name == NO_FACE else value.exp() for name, value in read.items()}


@pytest.fixture(scope="module")
def given(toys):
    """A recipe that goes by traits, a sampler of one step whose picture is the predicted one, noises, classifiers."""
    model = toys.denoiser()
    for weight in model.conv_out.parameters():
        weight.mul_(0.02)  # no picture is cut off at black or white
    recipe = toys.recipe(width=32, steps=1, features=6)
    levels = toys.levels(width=32, steps=1, features=6)
    recipe = replace(recipe, site="middle_block", model="", levels=levels, info={"tied": []})
    sampler, noise = DenoiserSampler(model, 1), start_noise(24, 3, 16)
    pictures = sampler.decode(sampler.sample(noise, torch.arange(24)))
    assert pictures.min() > 0 and pictures.max() < 1
    return recipe, sampler, noise, partial(Linear, pictures.mean(dim=0))


def random_products(latents: int = 5) -> Products:
    draw = torch.Generator().manual_seed(1)
    roots = torch.randn(3, 8, latents, generator=draw, dtype=torch.float64)
    return Products(*(root.T @ root for root in roots))


def test_the_weights_are_where_the_cost_is_flat_and_least():
    products = random_products()
    picture, own, others = products.shares()

    def cost(w):
        gap = w - 1
        kept = PICTURE * gap @ picture @ gap + KEEP * gap @ own @ gap
        return gap.square().mean() + kept + SPARE * w @ others @ w

    w = products.solve().double().requires_grad_()
    (slope,) = torch.autograd.grad(cost(w), w)
    assert slope.abs().max() < 1e-3 * cost(torch.ones_like(w))
    left = products.left(w.detach())
    assert left["others"] < 0.95 and abs(left["own"] - 1) < 0.1
    assert products.left(torch.ones(5)) == pytest.approx({"picture": 1, "own": 1, "others": 1})


def test_latents_that_change_nothing_keep_their_weight():
    assert torch.equal(Products.none(4).solve(), torch.ones(4))


def test_what_is_foreseen_is_what_a_small_edit_does_to_the_pictures(given):
    recipe, sampler, noise, linear = given
    classifier, images, small = linear(), torch.arange(24), 1e-3
    labels = read_classes(sampler, classifier, noise, 24, lambda done: None)
    own, edit = labels["age"], Steering(recipe, torch.Tensor.long)
    products, w = Products.none(6), torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, 0.8])
    kept = []

    def look(step, h, pictures):
        odds = log_odds(classifier.log_probabilities(pictures)["age"], own).sum()
        (gradient,) = torch.autograd.grad(odds, h)
        kept.append(h.detach())
        with torch.no_grad():
            add(products, edit, 0.0, h.detach(), own, torch.stack([3 * gradient, gradient, 2 * gradient]))

    sampler.predict(noise, images, "middle_block", [0], look)
    t, seen = edit.tensors(torch.device("cpu")), torch.zeros(())
    before = log_odds(classifier.log_probabilities(sampler.decode(sampler.sample(noise, images)))["age"], own)
    traits = edit.traits(kept[0], 0, t)
    for target in range(3):
        classes = torch.full_like(own, target)
        change = edit.level(classes, traits, 0) - edit.level(own, traits, 0)
        rows = t["scale"][0] * torch.einsum("bfp,fc->bcp", w[:, None] * change, recipe.decoder)

        class Small:
            site = "middle_block"

            def __call__(self, h, progress, images, rows=rows):
                return h + small * rows.view_as(h)

        after = classifier.log_probabilities(sampler.decode(sampler.sample(noise, images, [Small()])))["age"]
        seen = seen + ((log_odds(after, own) - before) / small).double().square().sum()
    foreseen = w.double() @ products.own @ w.double()
    assert float(foreseen) == pytest.approx(float(seen), rel=0.02) and float(foreseen) > 0
    assert torch.allclose(products.others, 4 * products.own) and torch.allclose(products.picture, 9 * products.own)


def test_random_signs_give_the_squared_effect_on_all_pixels_and_do_not_hang_on_the_batch():
    images, slope = torch.arange(400), torch.randn(12, generator=torch.Generator().manual_seed(2))
    signs = random_signs(images, 3, torch.zeros(400, 12))
    assert float((signs @ slope).square().mean()) == pytest.approx(float(slope.square().sum()), rel=0.2)
    assert torch.equal(random_signs(images[7:9], 3, torch.zeros(2, 12)), signs[7:9])
    assert not torch.equal(random_signs(images, 4, signs), signs)


def test_the_other_attributes_change_less_and_the_attribute_as_before(given, tmp_path):
    recipe, sampler, noise, linear = given
    weighed = weigh_latents(recipe, sampler, linear(), noise, 8, file=tmp_path / "weights.safetensors")
    drawn = []
    kept = weigh_latents(recipe, sampler, linear(), noise, 8, drawn.append, tmp_path / "weights.safetensors")
    assert torch.equal(kept.weight, weighed.weight) and kept.info == weighed.info and not drawn
    figures = weighed.info["weighed"]
    assert weighed.weight.shape == (6,) and figures["spared"] == ["hair", "tone"] and figures["pictures"] == 24
    assert figures["others"] < 1 and abs(figures["own"] - 1) < 0.3
    assert "hair, tone" in weighing_text(figures)
    other_batch = weigh_latents(recipe, sampler, linear(), noise, 24)
    torch.testing.assert_close(weighed.weight, other_batch.weight, rtol=1e-3, atol=1e-3)
    again = weigh_latents(weighed, sampler, linear(), noise, 8)  # begins anew
    torch.testing.assert_close(weighed.weight, again.weight)


def test_pictures_without_a_face_do_not_count(given):
    recipe, sampler, noise, linear = given
    some = weigh_latents(recipe, sampler, linear(), noise[2:], 24)
    faceless = weigh_latents(recipe, sampler, linear((0, 1)), noise, 24)
    assert faceless.info["weighed"]["pictures"] == 24 and torch.isfinite(faceless.weight).all()
    assert not torch.equal(some.weight, torch.ones(6))


def test_what_comes_with_the_class_is_not_spared(given):
    recipe, sampler, noise, linear = given
    weighed = weigh_latents(replace(recipe, info={"tied": ["hair"]}), sampler, linear(), noise, 24)
    assert weighed.info["weighed"]["spared"] == ["tone"]
    nothing = weigh_latents(replace(recipe, info={"tied": ["hair", "tone"]}), sampler, linear(), noise, 24)
    assert nothing.weight is None and "comes with the class" in weighing_text(nothing.info["weighed"])


@pytest.mark.parametrize("case", ["mode", "classifier", "attributes", "one class"])
def test_where_there_is_nothing_to_go_by_the_recipe_stays_and_says_why(given, case):
    recipe, sampler, noise, linear = given
    classifier = linear()
    if case == "mode":
        recipe = replace(recipe, mode="scale")
    elif case == "classifier":

        class Blind:
            attributes, classify = CLASSES, classifier.classify

        classifier = Blind()
    elif case == "attributes":
        classifier.attributes = {"age": CLASSES["age"]}
    else:
        classifier.weights["age"] = torch.zeros_like(classifier.weights["age"])
    found = weigh_latents(recipe, sampler, classifier, noise, 24)
    told = weighing_text(found.info["weighed"])
    words = {
        "mode": "mode scale",
        "classifier": "does not tell",
        "attributes": "nothing but age",
        "one class": "one class",
    }
    assert found.weight is None and words[case] in told and told.endswith(".")


def test_log_odds_are_exact_where_probabilities_round_to_one():
    logits = torch.tensor([[30.0, 0.0, -5.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = log_odds(logits.log_softmax(dim=1), torch.tensor([0, NO_CLASS]))
    expected = [30 - torch.tensor([0.0, -5.0]).double().logsumexp(0), -torch.tensor([1.0, 2.0]).double().logsumexp(0)]
    assert found.tolist() == pytest.approx([float(x) for x in expected], abs=1e-6)


def test_the_weights_are_what_the_edit_writes_with_and_travel_in_the_file(given, tmp_path):
    recipe, _, _, _ = given
    weight, h = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5, 0.0]), torch.randn(3, 32, 2, 2)
    weighed = replace(recipe, weight=weight)
    by_decoder = replace(recipe, decoder=weight[:, None] * recipe.decoder)
    for mode in ("reach", "shift", "add", "add own", "add fixed", "move", "clamp", "scale"):
        found, expected = (
            Steering(replace(one, mode=mode), lambda images: images % 3)(h, 0.0, torch.arange(3))
            for one in (weighed, by_decoder)
        )
        torch.testing.assert_close(found, expected)
    save_recipe(tmp_path / "weighed.safetensors", weighed)
    save_recipe(tmp_path / "plain.safetensors", recipe)
    assert torch.equal(load_recipe(tmp_path / "weighed.safetensors").weight, weight)
    assert load_recipe(tmp_path / "plain.safetensors").weight is None


def test_the_last_step_predicts_the_finished_picture_and_its_slope(toys):
    sampler, noise, images = DenoiserSampler(toys.denoiser(), 3), start_noise(2, 3, 16), torch.arange(2)
    told = {}

    def look(step, h, pictures):
        (told[step],) = torch.autograd.grad(pictures[1, 3, 4, 0], h)
        if step == 2:
            torch.testing.assert_close(pictures.detach(), sampler.decode(sampler.sample(noise, images)))

    sampler.predict(noise, images, "middle_block", [0, 2], look)
    assert [*told] == [0, 2] and not told[2][0].any() and Leaf("x").h is None
    step = torch.zeros_like(told[2])
    step[1, 5, 1, 0] = 1e-2

    class Nudge:
        site = "middle_block"

        def __init__(self, sign):
            self.sign = sign

        def __call__(self, h, progress, images):
            return h + self.sign * step if progress > 0.6 else h

    ends = [sampler.decode(sampler.sample(noise, images, [Nudge(sign)]))[1, 3, 4, 0] for sign in (1, -1)]
    assert float(told[2][1, 5, 1, 0]) == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=0.1, abs=1e-4)
