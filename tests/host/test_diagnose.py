"""Diagnose in a real ComfyUI: a good recipe and random features are told apart."""

from __future__ import annotations

import json
from pathlib import Path

from graphs import to_api
from small_graphs import Avatars, cancel_in, diagnose, image_of, text_of


def test_a_good_recipe_and_random_features_are_told_apart(server):
    graph = Avatars(pictures=32)
    captured = graph.capture(pictures=64, steps=6)
    labels = {"activations": captured[0], "labels": graph.labels(captured)}
    good = diagnose(graph, "avatars_presentation", steps=8, scan_sites=True, **labels)
    bad = diagnose(graph, str(Path("controls", "presentation_random")), steps=8)
    shown = {(node.id, slot): graph.show(node[slot]) for node in (good, bad) for slot in (0, 1)}
    entry = server.run(to_api(graph), timeout=900)
    text = {key: text_of(entry, node) for key, node in shown.items()}
    assert "Wrong features" not in text[good.id, 0]
    assert text[bad.id, 0].startswith("presentation: Wrong features: they change the pictures")
    found = {check["name"]: check for check in json.loads(text[good.id, 1])["checks"]}
    assert [check["verdict"] for check in found.values()] == ["good"] * 4, text[good.id, 0]
    assert len(found["right site"]["figures"]["sites"]) == 5
    figures = found["right features"]["figures"]
    assert figures["best"][-1] >= 0.8 > 0.2 >= figures["random"][-1]
    assert found["features disentangled"]["figures"]["fvu"] < 0.3
    found = {check["name"]: check["verdict"] for check in json.loads(text[bad.id, 1])["checks"]}
    assert found == {
        "right site": "not checked", "features disentangled": "not checked", "right features": "bad",
        "dose and effect": "bad",
    }  # fmt: skip
    assert image_of(server, entry, good).shape == (880, 1440, 3)
    assert image_of(server, entry, bad).shape == (440, 1440, 3)


def test_a_diagnosis_can_be_cancelled(server):
    graph = Avatars()
    cancel_in(server, graph, diagnose(graph, "avatars_age", pictures=500))
