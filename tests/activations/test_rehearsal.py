"""Pictures drawn twice: the second time edits are given what the site put out the first time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from difflens_core.activations import Held, Rehearsal
from difflens_core.files import DiffLensError
from difflens_core.networks import sample, start_noise

STEPS, PICTURES = 4, 3


@dataclass(eq=False)
class Push:
    """An edit that adds a number, and remembers what it was given."""

    amount: float
    holds: bool = True
    site: str = "middle_block"
    seen: list = field(default_factory=list)
    given: list = field(default_factory=list)

    def __call__(self, h, progress, images, unsteered=None):
        self.seen.append(h)
        self.given.append(unsteered)
        return h + self.amount


def drawn(toys, *edits):
    model = toys.denoiser()
    return sample(model, start_noise(PICTURES, 1, 16), STEPS, edits)


def test_an_edit_that_holds_is_given_the_unsteered_pictures_step_by_step(toys):
    plain, echo, push = Push(0.0, holds=False), Push(0.0), Push(0.5)
    unsteered = drawn(toys, plain)
    assert torch.equal(drawn(toys, echo), unsteered)
    steered = drawn(toys, push)
    assert float((steered - unsteered).abs().max()) > 0.01
    assert len(plain.seen) == len(echo.seen) == len(push.seen) == STEPS, "the first time no edit is made"
    for step, expected in enumerate(plain.seen):
        assert torch.equal(echo.seen[step], expected)
        for one in (echo, push):
            assert torch.equal(one.given[step].h, expected)
            assert torch.equal(one.given[step].last, plain.seen[-1])
            assert one.given[step].progress == pytest.approx(1 - 1 / STEPS)
    assert not torch.equal(push.seen[-1], plain.seen[-1])


def test_the_second_of_two_holds_on_to_what_the_first_makes_of_the_unsteered_pictures(toys):
    first, between, second, elsewhere = Push(0.5), Push(0.25, False), Push(0.1), Push(0.1, site="after_middle")
    drawn(toys, first, between, second, elsewhere)
    assert len(between.seen) == 2 * STEPS, "an edit that does not hold is made both times"
    for step in range(STEPS):
        expected = between.seen[step]  # before the edit, in the first run
        assert torch.equal(first.given[2 * step].h, expected), "it is made once more on the unsteered pictures"
        assert torch.equal(second.given[step].h, expected + 0.5) and torch.equal(second.given[step].plain, expected)
        assert torch.equal(second.given[step].last, between.seen[STEPS - 1])
    assert elsewhere.given == [None] * STEPS, "at another site it does not hold"


def test_the_nearest_step_serves_and_evaluations_of_one_step_are_told_apart():
    rehearsal, images = Rehearsal("middle"), torch.tensor([4, 2])
    maps = [torch.full((2, 1, 1, 1), float(value)) for value in range(4)]
    for progress, h in zip((0.0, 0.0, 0.5, 0.75), maps, strict=True):
        assert rehearsal(h, progress, images) is h
    push = Push(0.0)
    held = Held(push, rehearsal)
    for progress in (0.0, 0.0, 0.3, 0.6, 0.9):
        held(maps[0], progress, images)
    assert [float(one.h[0]) for one in push.given] == [0.0, 1.0, 2.0, 2.0, 3.0]
    with pytest.raises(DiffLensError, match="in other batches"):
        held(maps[0], 0.0, torch.tensor([2, 4]))
