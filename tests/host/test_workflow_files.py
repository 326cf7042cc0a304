"""The workflow files: both formats hold the graph that they are made from, drawn so that one can read it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import BLUEPRINTS, FOLDER, GRAPHS, SUBGRAPHS, to_api, to_blueprint, to_ui
from small_graphs import NAMES, OF_SCENES, api_file

# What 05, 06 and 11 ask the user to bring, by the input that names it.
BROUGHT = {
    "model_name": {"celebahq_p2.pt"}, "ckpt_name": {"v1-5-pruned-emaonly-fp16.safetensors"}, "sae_name": {"p2", "sd15"},
    "face_detector": {"yunet_final.pth"},
    "folder": {"p2/gender", "sd15/age"}, "classifier_name": {"res34_fair_align_multi_7_20190809.pt"},
}  # fmt: skip


def ui_file(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("make", [make for make in GRAPHS if make().name != OF_SCENES])
def test_files_are_what_their_description_makes(object_info, make):
    graph = make()
    assert ui_file(graph.name) == to_ui(graph, object_info)
    assert api_file(graph.name) == to_api(graph)


@pytest.mark.parametrize("make", SUBGRAPHS)
def test_blueprints_are_what_their_description_makes_and_are_offered(server, object_info, make):
    subgraph = make()
    file = BLUEPRINTS / f"{subgraph.name}.json"
    assert json.loads(file.read_text(encoding="utf-8")) == to_blueprint(subgraph, object_info)
    offered = {entry["name"] for entry in json.loads(server.request("/global_subgraphs")).values()}
    assert subgraph.name in offered


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_one_that_can_be_chosen(object_info, name):
    for node in api_file(name).values():
        declared = object_info[node["class_type"]]["input"]
        for key, value in node["inputs"].items():
            type_, options, *_ = (*(declared.get("required", {}) | declared.get("optional", {})).get(key, ("", {})), {})
            choices = type_ if isinstance(type_, list) else options.get("options") if type_ == "COMBO" else None
            assert choices is None or value in choices or value in BROUGHT.get(key, ()), (key, value)
            if type_ in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], (key, value)


def size_of(node: dict) -> list[int]:
    return [node["size"][0], 0] if node["flags"].get("collapsed") else node["size"]


@pytest.mark.parametrize("name", [*NAMES, OF_SCENES])
def test_a_group_goes_around_its_nodes_and_links_lead_to_the_right(name):
    """That no node lies on another is seen in the page, which knows their sizes."""
    ui = ui_file(name)
    corners = {
        node["id"]: (node["pos"][0], node["pos"][1] - 30, *np.add(node["pos"], size_of(node))) for node in ui["nodes"]
    }
    for _, origin, _, target, *_ in ui["links"]:
        assert corners[origin][0] <= corners[target][0]
    for x0, y0, x1, y1 in corners.values():
        around = [
            box for box in (group["bounding"] for group in ui["groups"]) if box[0] <= x0 and x1 <= box[0] + box[2]
        ]
        assert len(around) == 1 and y1 <= around[0][3] and y0 >= 0
    for group in ui["groups"]:
        assert len(group["title"]) * 10 <= group["bounding"][2], f"{group['title']} is longer than its group is wide"
