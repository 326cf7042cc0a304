"""The methods that the comparison takes from papers: their formulas, what is trained, and equal quotas for all."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402
import debias  # noqa: E402
from published import (  # noqa: E402
    LatentDirection,
    SemanticGuidance,
    direction_loss,
    learn_directions,
    sample_semantic,
)

from difflens_core.files import fingerprint  # noqa: E402
from difflens_core.networks import Guidance, sample, start_noise  # noqa: E402

WIDTH = 8  # of the context


@pytest.fixture(scope="module")
def guidance(toys):
    draw = toys.random(20)
    return Guidance(draw(1, 4, WIDTH), draw(1, 4, WIDTH), 2.0)


def of_class(images):
    return images % 3


# --- semantic guidance ---


def predicted_noise(model, x, sigma, context):
    """Noise that the clean picture implies, in double precision."""
    x0 = model(x.to(model.dtype), torch.full((len(x),), sigma), context.expand(len(x), -1, -1)).double()
    return (x - (1 - sigma) * x0) / sigma


def thresholded(change, quantile):
    """Each picture's and channel's values, set to 0 where their size is below that quantile."""
    change = change.clone()
    for picture in change.numpy():
        for channel in picture:
            channel[np.abs(channel) < np.quantile(np.abs(channel), quantile)] = 0
    return change


def test_semantic_guidance_is_that_of_the_papers_in_terms_of_noise(model, guidance, toys):
    """The loop of Brack et al., Algorithm 1, over predicted noise: three edit prompts, warm-up and momentum."""
    steps, scale, threshold, warmup, momentum, beta = 8, 3.0, 0.8, 2, 0.4, 0.6
    edits = toys.random(21)(3, 4, WIDTH)
    model = copy.deepcopy(model).double()  # rounding decides which values lie below a quantile
    x = start_noise(4, 5, 16).double()
    images, velocity = torch.arange(6, 10), 0.0
    found = sample_semantic(
        model,
        x,
        steps,
        SemanticGuidance(edits, of_class, scale, threshold, warmup, momentum, beta),
        guidance,
        6,
    )
    for i in range(steps):
        sigma = 1 - i / steps
        empty = predicted_noise(model, x, sigma, guidance.empty)
        eps = empty + guidance.cfg * (predicted_noise(model, x, sigma, guidance.context) - empty)
        added = momentum * velocity
        for number, edit in enumerate(edits):
            weight = torch.where(of_class(images) == number, 1.0, -0.5).double()[:, None, None, None]
            change = thresholded(predicted_noise(model, x, sigma, edit[None]) - empty, threshold)
            added = added + scale * weight * change
        velocity = beta * velocity + (1 - beta) * added
        if i >= warmup:
            eps = eps + added
        # The rectified flow's path through x with this noise; at sigma 1 the noise is x and tells nothing of x0.
        x0 = (x - sigma * eps) / (1 - sigma) if i else guided(model, x, guidance)
        x = x0 + (x - x0) * (sigma - 1 / steps) / sigma
    assert found.std() > 0.05
    torch.testing.assert_close(found.double(), x.clamp(-1, 1), atol=2e-3, rtol=0)
    assert (found - sample(model, start_noise(4, 5, 16).double(), steps, guidance=guidance)).abs().mean() > 0.02


def guided(model, x, guidance):
    """Clean picture at sigma 1."""
    of = [
        model(x.to(model.dtype), torch.ones(len(x)), c.expand(len(x), -1, -1))
        for c in (guidance.empty, guidance.context)
    ]
    return torch.lerp(*of, guidance.cfg).double()


def test_no_guidance_scale_samples_as_without(model, guidance, toys):
    noise = start_noise(3, 5, 16)
    semantic = SemanticGuidance(toys.random(21)(3, 4, WIDTH), of_class, 0.0)
    found = sample_semantic(model, noise, 5, semantic, guidance)
    torch.testing.assert_close(found, sample(model, noise, 5, guidance=guidance), atol=1e-5, rtol=0)


def test_semantic_guidance_goes_towards_the_class_asked_for(toys):
    """In the direction of its own prompt, away from the others', wherever the threshold lets it through."""
    draw = toys.random(22)
    semantic = SemanticGuidance(draw(2, 4, WIDTH), of_class, 2.0, threshold=0.0)
    edited, empty = draw(2, 5, 3, 4, 4), draw(5, 3, 4, 4)
    term = semantic.term(edited, empty, torch.tensor([[1.0, -1.0]]).expand(5, 2))
    torch.testing.assert_close(term, 2 * (edited[0] - edited[1]))
    assert semantic.signs(torch.tensor([0, 1])).tolist() == [[1, -1], [-1, 1]]


# --- latent direction ---


def test_learned_directions_lower_the_loss_and_train_nothing_else(model, toys):
    """Pictures that were sampled with two other directions: each is explained by its own class's direction best."""
    draw, classes = toys.random(23), torch.arange(24) // 12
    context = draw(24, 4, WIDTH)
    made_by = LatentDirection(10 * draw(2, 32, 2, 2), lambda images: classes[images])
    pictures = sample(model, start_noise(24, 9, 16), 5, [made_by], guidance=Guidance(context, context[:1]))
    weights = fingerprint(model.state_dict())
    state = torch.get_rng_state()
    directions = learn_directions(model, pictures, context, classes, steps=80, batch=4, lr=0.2)

    def loss(of):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)  # noise that was not trained on
            return float(direction_loss(model, of, pictures, context, classes))

    none, swapped = torch.zeros_like(directions), directions.flip(0)
    assert loss(directions) < 0.9 * min(loss(none), loss(swapped))
    assert fingerprint(model.state_dict()) == weights and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_direction_is_added_to_every_picture_of_its_class(toys):
    draw = toys.random(24)
    directions, h = draw(3, 6, 2, 2), draw(4, 6, 2, 2)
    found = LatentDirection(directions, of_class, 1.5)(h, 0.3, torch.tensor([7, 2, 0, 4]))
    torch.testing.assert_close(found, h + 1.5 * directions[torch.tensor([1, 2, 0, 1])])


# --- the comparison ---


def test_all_methods_ask_every_picture_for_the_same_class_in_exact_quotas(model, guidance, toys, monkeypatch):
    """Two batches and a bit, so that a method that numbered the pictures of a batch from 0 would be found out."""
    monkeypatch.setattr(debias, "BATCH", 5)
    for module in (compare, debias):
        monkeypatch.setattr(module, "STEPS", 3)
    read = torch.eye(3)[torch.tensor([0] * 7 + [1] * 4 + [2])]
    asked = compare.assign(read, seed=4)
    assert Counter(asked.tolist()) == {0: 4, 1: 4, 2: 4} and int((asked != read.argmax(dim=1)).sum()) == 3
    setting = compare.Setting(model, guidance, start_noise(12, 8, 16))
    random = toys.random(25)
    for draw in (
        compare.by_recipe(replace(toys.recipe(width=32), site="middle_block")),
        compare.by_guidance(random(3, 4, WIDTH)),
        compare.by_direction(random(3, 32, 2, 2)),
    ):
        seen = []

        def target_of(images, seen=seen):
            seen.append(images.tolist())
            return asked[images]

        assert draw(setting, target_of, 1.0).shape == (12, 3, 16, 16)
        assert sorted({i for images in seen for i in images}) == list(range(12))
        assert {tuple(images) for images in seen} == {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11)}
