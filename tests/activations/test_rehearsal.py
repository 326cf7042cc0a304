"""Pictures drawn twice: the second time edits are given what the site put out the first time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import pytest
import torch

from difflens_core.activations import Held, Rehearsal
from difflens_core.activations.rehearsal import mixed
from difflens_core.files import DiffLensError
from difflens_core.networks import sample, start_noise

STEPS, PICTURES = 4, 3


@dataclass(eq=False)
class Push:
    """An edit that adds a number, and remembers what it was given."""

    amount: float
    holds: bool = True
    site: str = "middle_block"
    until: float = 1.0
    seen: list = field(default_factory=list)
    given: list = field(default_factory=list)

    def acts(self, progress):
        return progress < self.until

    def __call__(self, h, progress, images, shown=None):
        self.seen.append(h)
        self.given.append(shown)
        return h + self.amount if self.acts(progress) else h


def drawn(toys, *edits):
    model = toys.denoiser()
    return sample(model, start_noise(PICTURES, 1, 16), STEPS, edits)


def test_an_edit_that_holds_is_given_the_unsteered_pictures_step_by_step(toys):
    plain, echo, push = Push(0.0, holds=False), Push(0.0), Push(0.5)
    unsteered = drawn(toys, plain)
    assert torch.equal(drawn(toys, echo), unsteered)
    steered = drawn(toys, push)
    assert float((steered - unsteered).abs().max()) > 0.01
    assert len(plain.seen) == STEPS and len(echo.seen) == len(push.seen) == 2 * STEPS, "the first time no edit is made"
    for step, expected in enumerate(plain.seen):
        assert torch.equal(echo.seen[2 * step], expected)
        for one in (echo, push):
            assert torch.equal(one.seen[2 * step + 1], expected)
            for given in one.given:
                assert torch.equal(given.h, plain.seen[-1]) and given.progress == pytest.approx(1 - 1 / STEPS)
    assert not torch.equal(push.seen[-2], plain.seen[-1])


def test_two_at_one_site_hold_together_and_one_at_another_does_not(toys):
    first, between, second, elsewhere = Push(0.5), Push(0.25, False), Push(0.1), Push(0.1, site="after_middle")
    drawn(toys, first, between, second, elsewhere)
    assert len(between.seen) == 2 * STEPS, "an edit that does not hold is made both times"
    for step in range(STEPS):
        expected = between.seen[step]  # before the edit, in the first run
        assert torch.equal(first.seen[2 * step + 1], expected), "it is made once more on the unsteered pictures"
        assert torch.equal(second.seen[2 * step], first.seen[2 * step] + 0.5 + 0.25)
        assert torch.equal(second.seen[2 * step + 1], expected + 0.5)
    assert elsewhere.given == [None] * STEPS, "at another site it does not hold"


def by_hand(now, then, change, progress):
    """`mixed`, position by position."""
    found = now.clone()
    for b, picture in enumerate(change):
        sizes = picture.square().sum(dim=0).sqrt()
        for y, x in product(range(sizes.shape[0]), range(sizes.shape[1])):
            if sizes.max() > 0:
                share = progress * min(1.0, 4 * float(sizes[y, x] / sizes.max()))
                found[b, :, y, x] = share * now[b, :, y, x] + (1 - share) * then[b, :, y, x]
    return found


def test_held_is_most_what_is_changed_least_and_a_picture_that_is_not_changed_is_left_alone(toys):
    draw = toys.random(3)
    now, then, change = (draw(3, 4, 3, 2) for _ in range(3))
    change[:, :, 0] *= 0.1
    change[1] = 0
    found = mixed(now, then, change, 0.6)
    torch.testing.assert_close(found, by_hand(now, then, change, 0.6))
    assert torch.equal(found[1], now[1])


def test_those_that_act_hold_in_the_last_of_them(toys):
    rehearsal, images, h = Rehearsal("middle"), torch.arange(2), toys.random(4)(2, 3, 2, 2)
    unsteered = toys.random(5)(2, 3, 2, 2)
    for progress in (0.2, 0.8):
        rehearsal(unsteered, progress, images)
    chain = [Push(0.5), Push(0.25, until=0.5)]
    first, second = (Held(edit, rehearsal, chain) for edit in chain)
    early = second(first(h, 0.2, images), 0.2, images)
    torch.testing.assert_close(early, by_hand(h + 0.75, unsteered + 0.75, torch.full_like(h, 0.75), 0.2))
    late = second(first(h, 0.8, images), 0.8, images)
    torch.testing.assert_close(late, by_hand(h + 0.5, unsteered + 0.5, torch.full_like(h, 0.5), 0.8))
    assert torch.equal(Held(chain[1], rehearsal, chain[1:])(h, 0.8, images), h), "nobody acts any more"


def test_the_nearest_step_serves_and_evaluations_of_one_step_are_told_apart():
    rehearsal, images = Rehearsal("middle"), torch.tensor([4, 2])
    maps = [torch.full((2, 1, 1, 1), float(value)) for value in range(4)]
    for progress, h in zip((0.0, 0.0, 0.5, 0.75), maps, strict=True):
        assert rehearsal(h, progress, images) is h
    push = Push(0.0)
    held = Held(push, rehearsal, [push])
    for progress in (0.0, 0.0, 0.3, 0.6, 0.9):
        held(maps[0], progress, images)
    assert [float(h[0]) for h in push.seen[1::2]] == [0.0, 1.0, 2.0, 2.0, 3.0]
    with pytest.raises(DiffLensError, match="in other batches"):
        held(maps[0], 0.0, torch.tensor([2, 4]))


def test_of_several_areas_each_is_shown_its_own_end():
    rehearsal, images = Rehearsal("middle"), torch.tensor([0])
    for progress, value in ((0.0, 1.0), (0.0, 2.0), (0.5, 3.0), (0.5, 4.0)):
        rehearsal(torch.full((1, 1, 1, int(value)), value), progress, images)  # the areas differ in width
    push = Push(0.0)
    held = Held(push, rehearsal, [push])
    for progress, wide in ((0.0, 1), (0.0, 2), (0.5, 3), (0.5, 4)):
        held(torch.zeros(1, 1, 1, wide), progress, images)
    assert [float(shown.h[0, 0, 0, 0]) for shown in push.given[::2]] == [3.0, 4.0, 3.0, 4.0]
