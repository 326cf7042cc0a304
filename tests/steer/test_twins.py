"""Recipes that know from twins what changes in a picture of another class, wherever in it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from difflens_core.activations import Activations, Shown, draw_held
from difflens_core.files import DiffLensError
from difflens_core.locate import Changes, LabelledPictures, attribute_features, train_probes
from difflens_core.locate.changes import SURE
from difflens_core.steer import (
    TWIN,
    Recipe,
    Steering,
    as_stored,
    build_recipe,
    joined,
    load_recipe,
    of_latents,
    random_features,
    save_directions,
    save_recipe,
    with_settings,
)
from difflens_core.steer.controls import change_norm, mean_difference
from difflens_core.targets import LEFT_ALONE

SIZE, TARGET = (3, 5), torch.tensor([0, 2])


@pytest.fixture
def recipe(toys) -> Recipe:
    draw = toys.random(11)
    return toys.recipe(mode=TWIN, hold=True, changes=some_changes(draw))


def some_changes(draw: Callable[..., torch.Tensor]) -> Changes:
    """Of 5 latents, 3 classes and 3 steps."""
    layers = draw(7, 3, 3, 6) / 3, draw(7), draw(7, 3, 3, 7) / 3, draw(7), draw(3, 8, 7), draw(3, 8)
    return Changes(draw(6, 6), draw(6), *layers, draw(3, 2), draw(4).abs(), draw(4, 5))


@pytest.fixture
def maps(toys) -> tuple[torch.Tensor, Shown]:
    """What the site puts out now, and at the last step of the unsteered pictures."""
    draw = toys.random(12)
    return draw(2, 6, *SIZE), Shown(draw(2, 6, *SIZE), 2 / 3)


def by_hand(recipe: Recipe, shown: Shown, step: int) -> torch.Tensor:
    """The change of two pictures, position by position."""
    norm, c = recipe.normalisation, recipe.changes
    found = torch.zeros_like(shown.h)
    for b, target in enumerate(TARGET.tolist()):
        rows = (shown.h[b].movedim(0, -1) - norm.mean[2]) / norm.scale[2]
        seen = rows @ c.readout.T + c.offset
        for weight, bias in ((c.first, c.first_bias), (c.second, c.second_bias)):
            seen = around(seen, weight, bias)
        every = seen @ c.last[target].T + c.last_bias[target]
        size = sum((every[..., course * 4 + e] * c.sizes[e]) ** 2 for course, e in product(range(2), range(4))) ** 0.5
        for y, x in product(range(SIZE[0]), range(SIZE[1])):
            less = max(0.0, float(size[y, x] - SURE * size.max())) / float(size[y, x]) / (1 - SURE)
            told = less * every[y, x]
            change = sum(
                c.amounts[step, course] * told[course * 4 + e] * c.maps[e] for course, e in product(range(2), range(4))
            )
            found[b, :, y, x] = recipe.strength[target] * norm.scale[step] * recipe.decoder.T @ change
    return found


def around(seen: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A layer at every position of a map (H x W x D), with nothing beyond its edges."""
    found = torch.zeros(*seen.shape[:2], len(weight))
    for y, x in product(range(seen.shape[0]), range(seen.shape[1])):
        total = bias.clone()
        for dy, dx in product((-1, 0, 1), (-1, 0, 1)):
            if 0 <= y + dy < seen.shape[0] and 0 <= x + dx < seen.shape[1]:
                total += weight[:, dy + 1, dx + 1] @ seen[y + dy, x + dx]
        found[y, x] = total * (1 + torch.erf(total / 2**0.5)) / 2
    return found


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_change_is_read_off_the_finished_picture_around_each_position(recipe, maps, step):
    h, shown = maps
    steered = Steering(recipe, lambda images: TARGET[images])(h, step / 3, torch.arange(2), shown)
    assert torch.allclose(steered - h, by_hand(recipe, shown, step), atol=1e-4)


def test_what_moves_in_the_picture_moves_the_change(recipe, maps):
    h, shown = maps
    edit = Steering(recipe, lambda images: TARGET[images])
    seen = torch.nn.functional.pad(shown.h, (3, 5, 3, 4))
    there = torch.zeros_like(seen)
    change = edit(there, 0.0, torch.arange(2), Shown(seen, shown.progress))
    moved = edit(there, 0.0, torch.arange(2), Shown(seen.roll((1, 2), (2, 3)), shown.progress))
    assert torch.allclose(moved[..., 3:-2, 4:-2], change[..., 2:-3, 2:-4], atol=1e-3), "but where an edge is near"
    assert not edit.stretch(torch.zeros(1, 6, 9, 4)), "it serves maps of every size"


def test_pictures_left_alone_and_masked_places_stay(recipe, maps):
    h, shown = maps
    alone = Steering(recipe, lambda images: torch.tensor([LEFT_ALONE, 1])[images])(h, 0.0, torch.arange(2), shown)
    assert torch.equal(alone[0], h[0]) and not torch.equal(alone[1], h[1])
    mask = torch.zeros(1, *SIZE)
    mask[:, :, 3:] = 1
    masked = Steering(recipe, lambda images: TARGET[images], mask=mask)(h, 0.0, torch.arange(2), shown)
    assert torch.equal(masked[..., :3], h[..., :3]) and not torch.equal(masked[..., 3:], h[..., 3:])


def test_a_batch_changes_as_its_pictures_do_alone(recipe, maps):
    h, shown = maps
    edit = Steering(recipe, lambda images: TARGET[images])
    both = edit(h, 0.0, torch.arange(2), shown)
    for i in range(2):
        alone = edit(h[i : i + 1], 0.0, torch.tensor([i]), Shown(shown.h[i : i + 1], shown.progress))
        assert torch.allclose(alone, both[i : i + 1], atol=1e-5)


def test_it_must_hold_and_says_so(recipe, maps):
    with pytest.raises(DiffLensError, match="mode twin looks at the finished picture before it changes it, so hold"):
        with_settings(recipe, hold=False)
    with pytest.raises(DiffLensError, match="knows no levels of single positions, by which mode 'shift' goes. Leave"):
        with_settings(recipe, mode="shift")
    with pytest.raises(DiffLensError, match="mode twin is for recipes from pictures that were captured as twins"):
        replace(recipe, changes=None)
    with pytest.raises(DiffLensError, match="learned from twins, .* is of one site and cannot be joined"):
        joined(recipe, replace(recipe, site="other"))
    with pytest.raises(DiffLensError, match="learned from twins, .* is of one site and cannot be joined"):
        joined(replace(recipe, site="other", mode="shift", changes=None), recipe)  # its levels know no place
    with pytest.raises(DiffLensError, match="only recipes of one site can hold at once"):
        Steering(recipe, lambda images: TARGET[images])(maps[0], 0.0, torch.arange(2))
    with pytest.raises(DiffLensError, match="goes by where things are in a picture, and a direction does not move"):
        save_directions("nowhere.safetensors", recipe)


def test_a_file_keeps_it(recipe, maps, tmp_path):
    h, shown = maps
    kept = as_stored(recipe)
    save_recipe(tmp_path / "r.safetensors", recipe)
    loaded = load_recipe(tmp_path / "r.safetensors")
    once, again = (
        Steering(of, lambda images: TARGET[images])(h, 0.0, torch.arange(2), shown) - h for of in (kept, loaded)
    )
    exact = Steering(recipe, lambda images: TARGET[images])(h, 0.0, torch.arange(2), shown) - h
    assert torch.equal(once, again) and (once - exact).norm() < 0.05 * exact.norm()


def test_some_latents_write_alone(recipe, maps):
    h, shown = maps
    kept = torch.tensor([True, False, True, True, False])
    some = of_latents(recipe, kept)
    weighed = replace(recipe, weight=kept.float())
    one, other = (Steering(of, lambda images: TARGET[images])(h, 0.0, torch.arange(2), shown) for of in (some, weighed))
    assert torch.allclose(one, other, atol=1e-5)


def captured(toys, noises: int = 200) -> tuple[Activations, torch.Tensor]:
    """Twins of two classes: channel 0 says that something is there, and channel 1 what the class makes of it."""
    draw, labels = toys.random(13), torch.tensor([0, 1]).repeat(noises)
    values = 0.3 * draw(3, 2 * noises, 6, 2, 4)
    there = (draw(noises, 2, 4) > 0).float().repeat_interleave(2, dim=0)
    values[:, :, 0] += 3 * there
    values[:, :, 1] += 3 * there * (2.0 * labels[:, None, None] - 1)
    return Activations(values, torch.arange(3) / 3, "middle", twins=2), labels


def test_a_recipe_of_twins_turns_what_is_there_and_so_do_its_controls(toys):
    activations, labels = captured(toys)
    sae = replace(toys.sae(latents=24, k=6), normalisation=replace(
        toys.normalisation(), mean=torch.zeros(3, 6), scale=torch.ones(3),
    ))  # fmt: skip
    axes = torch.cat([torch.eye(6), -torch.eye(6), torch.eye(6) - 0.1, -torch.eye(6) - 0.1])
    sae = replace(sae, encoder=axes, decoder=axes, encoder_bias=torch.zeros(24), decoder_bias=torch.zeros(6))
    probes = train_probes(activations, sae, labels, "kind", ("a", "b"))
    found = attribute_features(activations, sae, probes, labels)
    recipe = build_recipe(found, sae, probes, activations, labels, {}, 6)
    assert recipe.mode == TWIN and recipe.hold and recipe.map is None and recipe.levels.positions == 1
    with pytest.raises(DiffLensError, match="kind: pictures of a second size serve only where twins of both"):
        seen = LabelledPictures(activations, labels, {})
        build_recipe(found, sae, probes, replace(activations, twins=1), labels, {}, 6, more=[seen])
    h = torch.zeros(1, 6, 1, 2)
    h[0, :2, 0, 0] = torch.tensor([3.0, -3.0])  # something of class a, and nothing beside it
    to_b = Steering(recipe, lambda images: torch.ones(1, dtype=torch.int64))
    change = (to_b(h, 0.0, torch.arange(1), Shown(h, 2 / 3)) - h)[0, 1, 0]
    assert change[0] > 2 and change[1].abs() < 0.1 * change[0]
    to_a = Steering(recipe, lambda images: torch.zeros(1, dtype=torch.int64))
    assert (to_a(h, 0.0, torch.arange(1), Shown(h, 2 / 3)) - h).abs().max() < 0.3, "it is of class a already"
    raw = mean_difference(recipe, [LabelledPictures(activations, labels, {})])
    change = (Steering(raw, to_b.target_of)(h, 0.0, torch.arange(1), Shown(h, 2 / 3)) - h)[0, 1, 0]
    assert change[0] > 1, "without an SAE it is told off the channels here as well"
    control = random_features(recipe, sae, seed=1)
    own, other = (change_norm(of.changes, of.decoder) for of in (recipe, control))
    assert torch.isclose(own, other, rtol=1e-4) and control.mode == TWIN


def test_pictures_are_read_once_and_forgotten_when_they_are_drawn(recipe, maps, monkeypatch):
    h, shown = maps
    edit, read = Steering(recipe, lambda images: TARGET[images]), []
    told = Changes.told
    monkeypatch.setattr(Changes, "told", lambda self, *of: read.append(of) or told(self, *of))
    first = [edit(h, step / 3, torch.arange(2), shown) for step in range(3)]
    other = Shown(shown.h + 1, shown.progress)
    assert not torch.equal(edit(h, 0.0, torch.arange(2), other), first[0]) and len(read) == 2
    del other
    gc.collect()
    assert len(edit._told) == 1
    assert torch.equal(edit(h, 0.0, torch.arange(2), shown), first[0]) and len(read) == 2


def test_drawn_held_it_reads_the_first_drawing(recipe, maps):
    """The second time a picture is drawn, the change is that of the first."""
    h, _ = maps
    edit, seen = Steering(recipe, lambda images: TARGET[images]), []

    def draw(edits):
        x = h
        for step in range(3):
            for one in edits:
                x = one(x, step / 3, torch.arange(2))
            seen.append(x)
        return x

    drawn = draw_held(draw, [edit])
    assert torch.equal(seen[2], h) and not torch.equal(drawn, h)


def test_making_it_can_be_cancelled_while_pairs_are_read(toys):
    activations, labels = captured(toys)
    sae = toys.sae()
    probes = train_probes(activations, sae, labels, "kind", ("a", "b"))
    found, told = attribute_features(activations, sae, probes, labels), []

    def cancel(step: int) -> None:
        told.append(step)
        if len(told) > 3:  # the three steps of the levels come first
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_recipe(found, sae, probes, activations, labels, {}, 6, on_step=cancel)
    assert told == [1, 2, 3, 3]
