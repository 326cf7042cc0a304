"""A toy model in which it is known what every strength does, and recipes for it."""

from __future__ import annotations

import numpy as np
import torch

from difflens_core.locate import Levels
from difflens_core.sae import Normalisation
from difflens_core.steer import Recipe

CLASSES = ("young", "adult", "senior")
UNIFORM = np.full(3, 1 / 3)
START = (0.2, 0.7, 0.1)


def recipe(power: float = 1.0, first: int = 0, attribute: str = "age", leak: float = 0.0) -> Recipe:
    """Three latents, one a class, that write into channels `first` to `first` + 2 of six, `power` as loud as they
    should. leak: how much of each goes into the three channels after those.
    """
    channels = torch.eye(6)[first : first + 3]
    decoder = power * channels + leak * torch.eye(6).roll(3, dims=1)[first : first + 3]
    normalisation = Normalisation(torch.zeros(1), torch.zeros(1, 6), torch.ones(1))
    levels = torch.eye(3)[None, :, :, None].expand(1, 3, 3, 4).clone()
    return Recipe(
        attribute, CLASSES, "site", "toy", torch.arange(3), channels, torch.zeros(3), torch.zeros(3), decoder,
        torch.eye(3).bool(), Levels.of(levels), 8 * channels[None], torch.zeros(1, 3), normalisation,
        strength=(1.0,) * 3,
    )  # fmt: skip


class Draws:
    """How experiments draw with a function of edits and numbers whose latents are the pictures."""

    def __init__(self, function):
        self.function = function

    def __call__(self, edits, which):
        return self.function(edits, which)

    def latents(self, edits, which):
        return self(edits, which)

    @staticmethod
    def pictures(latents):
        return latents


class Toy(Draws):
    """A model of one step, whose picture is its hidden state: in each half of six channels one is loud.

    The class is the loudest channel of a half; noise number i always gives the same picture.
    """

    def __init__(self, noises: int = 4096, starts: tuple = (START, (0.6, 0.3, 0.1))):
        rng = np.random.default_rng(1)
        self.drawn: list[int] = []
        halves = [torch.eye(3)[torch.from_numpy(rng.choice(3, noises, p=start))] for start in starts]
        noise = torch.from_numpy(rng.normal(0, 0.12, (noises, 6, 2, 2))).float()
        self.h = torch.cat(halves, dim=1)[:, :, None, None] + noise

    def __call__(self, edits, which):
        self.drawn += which.tolist()
        h, images = self.h[which], torch.arange(len(which))
        for edit in edits:
            h = edit(h, 0.0, images)
        return h

    @staticmethod
    def classify(pictures):
        pooled = pictures.mean(dim=(2, 3))
        return {"age": (20 * pooled[:, :3]).softmax(dim=1), "tone": (20 * pooled[:, 3:]).softmax(dim=1)}

    @classmethod
    def ages(cls, pictures):
        return cls.classify(pictures)["age"]
