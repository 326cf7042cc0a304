"""Explore Features on a real server: what it hands to the page, what was chosen, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from expected import shipped
from graphs import Link, Node, to_api
from PIL import Image
from small_graphs import Avatars, image_of, latents, refusal, text_of

from difflens_core.explore import chosen, parse_choice
from difflens_core.steer import as_stored, load_recipe

PICTURES = 12
HOSTILE = "</script><img src=x onerror=alert(1)>"


class Explorer(Avatars):
    """Explore Features on a small capture of the avatars."""

    def __init__(self) -> None:
        super().__init__(PICTURES)
        self.captured = self.capture(pictures=PICTURES, steps=4)

    def explore(self, choice: str | dict = "", **inputs: object) -> Node:
        if not inputs.keys() & {"recipe", "sae"}:
            inputs["recipe"] = self.recipe("avatars_presentation")
        text = choice if isinstance(choice, str) else json.dumps({"features": choice})
        given = {"activations": self.captured[0], "images": self.captured[1], "choice": text, "save_as": ""}
        return self.add("DiffLensExplore", **given | inputs)

    def drawn(self, recipe: Link | None = None, **settings: object) -> Node:
        """Latents of two pictures, steered by the recipe to one class."""
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=2)
        return self.save(self.draw(self.steer(recipe, **{"target": "feminine", **settings})[0] if recipe else None))


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
    assert found["classes"] == list(recipe.classes) and sum(found["pictures"]) == PICTURES
    assert all(card["on"] and len(card["top"]) == 6 for card in found["features"])
    heat = np.frombuffer(base64.b64decode(found["heat"]), np.uint8).reshape(len(recipe.features), 6, *found["map"])
    assert heat[:, 0].reshape(len(heat), -1).max(axis=1).tolist().count(255) > 0.9 * len(heat)
    (sheet,) = found["sheets"]
    picture = np.asarray(Image.open(io.BytesIO(server.get_image(sheet))))
    assert found["thumbnail"] == [64, 64] and picture.shape == (64, 16 * 64, 3) and picture.std() > 10
    assert len(text_of(entry, table).splitlines()) == 1 + len(recipe.features)
    assert image_of(server, entry, node).std() > 10


def test_what_was_chosen_is_steered_by_and_saved(server):
    features = shipped("presentation").features.tolist()
    choice = {str(number): {"on": False} for number in features[40:]}
    choice |= {str(features[0]): {"weight": 0.25, "name": HOSTILE, "group": "hair"}}
    graph = Explorer()
    node = graph.explore(choice, save_as="chosen/hair")
    drawn = graph.drawn(node[0])
    entry = server.run(to_api(graph))
    saved = load_recipe(server.base / "models" / "difflens_recipes" / "chosen" / "hair.safetensors")
    expected = as_stored(
        chosen(shipped("presentation"), "middle_block", parse_choice(json.dumps({"features": choice})))
    )
    assert saved.features.tolist() == features[:40] and saved.weight[0] == 0.25 and saved.info == expected.info
    assert saved.info["named"] == {str(features[0]): {"name": HOSTILE, "group": "hair"}}
    assert entry["outputs"][str(node.id)]["difflens_saved"] == ["chosen/hair.safetensors"]
    assert HOSTILE not in json.dumps(cards_of(server, entry, node)), "the cards are those of what came in"
    again = Explorer()
    loaded = again.explore(recipe=again.recipe("chosen/hair"))
    same = again.drawn(again.recipe("chosen/hair"))
    second = server.run(to_api(again))
    card = cards_of(server, second, loaded)["features"][0]
    assert (card["name"], card["group"], card["weight"], card["on"]) == (HOSTILE, "hair", 0.25, True)
    assert torch.equal(latents(server, second, same), latents(server, entry, drawn))


def test_nothing_chosen_is_the_recipe_and_nothing_ticked_is_no_steering(server):
    graph = Explorer()
    none = {str(number): {"on": False} for number in shipped("presentation").features.tolist()}
    nodes = [graph.drawn(graph.explore()[0]), graph.drawn(graph.recipe("avatars_presentation"))]
    nodes += [graph.drawn(graph.explore(none)[0]), graph.drawn()]
    entry = server.run(to_api(graph))
    all_, plain, nothing, unsteered = (latents(server, entry, node) for node in nodes)
    assert torch.equal(all_, plain) and torch.equal(nothing, unsteered)
    assert (plain - unsteered).abs().max() > 0.1


def test_a_copy_never_replaces_another_recipe(server):
    path = server.base / "models" / "difflens_recipes" / "mine.safetensors"
    for choice in ("", ""):
        graph = Explorer()
        graph.explore(choice, save_as="mine")
        server.run(to_api(graph))
    written = path.read_bytes()
    graph = Explorer()
    graph.explore({"121": {"on": False}}, save_as="mine")
    assert "mine.safetensors is there already and holds another recipe" in refusal(server, graph)
    assert path.read_bytes() == written
    graph = Explorer()
    graph.explore(save_as="../mine")
    assert "cannot be a file name" in refusal(server, graph)


def test_features_of_an_sae_do_nothing_until_they_are_ticked(server):
    graph = Explorer()
    sae, labels = graph.sae(), graph.labels(graph.captured)
    first = graph.explore(sae=sae, labels=labels)
    entry = server.run(to_api(graph))
    found = cards_of(server, entry, first)
    assert len(found["features"]) == 500 and not any(card["on"] for card in found["features"])
    best = max(found["features"], key=lambda card: card["tells"][1])
    ticked = graph.explore({str(best["id"]): {"on": True, "weight": 3.0}}, sae=sae, labels=labels)
    nodes = [graph.drawn(node, sae=sae, target="uniform") for node in (first[0], ticked[0])] + [graph.drawn()]
    entry = server.run(to_api(graph))
    nothing, one, plain = (latents(server, entry, node) for node in nodes)
    assert torch.equal(nothing, plain) and (one - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("choice", "inputs", "message"),
    [
        ("{", {}, "choice is not what the explorer writes"),
        ('{"features": {"1": {"on": "yes"}}}', {}, "on cannot be 'yes'"),
        ("", {"images": "others"}, f"there are 3 images for {PICTURES} captured pictures"),
        ("", {"recipe": None}, "there is nothing to show. Connect a recipe, or an SAE"),
        ("", {"activations": "down"}, "the activations are of down .* Capture at the recipe's site"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(server, choice, inputs, message):
    graph = Explorer()
    if "images" in inputs:
        inputs = {"images": graph.add("EmptyImage", width=64, height=64, batch_size=3, color=0)[0]}
    if "activations" in inputs:
        inputs = {"activations": graph.capture(pictures=PICTURES, steps=4, site="down")[0]}
    node = graph.explore(choice, **inputs)
    node.inputs = {name: value for name, value in node.inputs.items() if value is not None}
    found = refusal(server, graph)
    assert "Explore Features: " in found and re.search(message, found)
