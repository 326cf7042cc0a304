"""Explore Features on a real server: what it hands to the page, what was chosen, and what is refused."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from expected import shipped
from graphs import to_api
from host import HostError
from PIL import Image
from small_graphs import Avatars, cancel_in, image_of, latents, refusal, text_of

from difflens_core.steer import load_recipe

RECIPES = "models/difflens_recipes"


class Explorer(Avatars):
    """Explore Features on a small capture of the avatars."""

    def __init__(self, pictures: int = 12):
        super().__init__(pictures)
        self.captured = self.capture(pictures=pictures, steps=4)

    def explore(self, choice: object = "", **inputs: object):
        text = choice if isinstance(choice, str) else json.dumps({"features": choice})
        inputs = {"recipe": self.recipe("avatars_presentation")} if not inputs.keys() & {"recipe", "sae"} else {} | inputs
        return self.add(
            "DiffLensExplore", activations=self.captured[0], images=self.captured[1], choice=text,
            **{"save_as": "", **inputs},
        )  # fmt: skip


def cards_of(server, entry: dict, node) -> dict:
    (reference,) = entry["outputs"][str(node.id)]["difflens_features"]
    return json.loads(server.get_image(reference))


def test_the_page_is_given_every_feature_and_its_pictures(server):
    graph = Explorer()
    node = graph.explore()
    table = graph.show(node[1])
    entry = server.run(to_api(graph))
    found, recipe = cards_of(server, entry, node), shipped("presentation")
    assert [card["id"] for card in found["features"]] == recipe.features.tolist()
    assert found["classes"] == list(recipe.classes) and sum(found["pictures"]) == 12
    assert all(card["on"] and len(card["top"]) == 6 for card in found["features"])
    heat = np.frombuffer(base64.b64decode(found["heat"]), np.uint8).reshape(len(recipe.features), 6, *found["map"])
    assert heat[:, 0].reshape(len(heat), -1).max(axis=1).tolist().count(255) > 0.9 * len(heat)
    (sheet,) = found["sheets"]
    picture = np.asarray(Image.open(io.BytesIO(server.get_image(sheet))))
    assert found["thumbnail"] == [64, 64] and picture.shape == (64, 16 * 64, 3) and picture.std() > 10
    assert len(text_of(entry, table).splitlines()) == 1 + len(recipe.features)
    assert image_of(server, entry, node).std() > 10
