"""The workflow files: both formats hold the graph that they are made from, drawn so that one can read it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import FOLDER, GRAPHS, to_api, to_ui
from small_graphs import NAMES, api_file

# What 05, 06 and 11 ask the user to bring, by the input that names it.
BROUGHT = {
    "model_name": {"celebahq_p2.pt"}, "ckpt_name": {"v1-5-pruned-emaonly.safetensors"}, "sae_name": {"p2", "sd15"},
    "face_detector": {"yunet_final.pth"},
    "folder": {"p2/gender", "sd15/age"}, "classifier_name": {"res34_fair_align_multi_7_20190809.pt"},
}  # fmt: skip


def ui_file(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("make", GRAPHS)
def test_files_are_what_their_description_makes(object_info, make):
    graph = make()
    assert ui_file(graph.name) == to_ui(graph, object_info)
    assert api_file(graph.name) == to_api(graph)


def widgets_of(info: dict, values: list) -> dict:
    """Widget values of a node by name, in the order in which ComfyUI makes the widgets."""
    found, values = {}, iter(values)
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            type_, options = info["input"][kind][name][0], (info["input"][kind][name][1:] or [{}])[0]
            choices = type_ if isinstance(type_, list) else options.get("options")
            if choices is None and type_ not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                continue
            found[name] = value = next(values)
            assert choices is None or value in choices or value in BROUGHT.get(name, ()), name
            if type_ in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], name
            if options.get("control_after_generate", name in ("seed", "noise_seed")):
                assert next(values) in ("fixed", "increment", "decrement", "randomize"), name
    assert next(values, None) is None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_hold_the_same_graph(object_info, name):
    ui, api = ui_file(name), api_file(name)
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    links = {link[0]: link for link in ui["links"]}
    assert nodes.keys() == api.keys() and len(ui["nodes"]) == len(nodes) + 1
    for node_id, node in nodes.items():
        inputs = widgets_of(object_info[node["type"]], node["widgets_values"])
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                _, origin, origin_slot, target, target_slot, type_ = links[socket["link"]]
                assert (target, target_slot, type_) == (node["id"], slot, socket["type"])
                out = nodes[str(origin)]["outputs"][origin_slot]
                assert socket["link"] in out["links"] and out["type"] == type_ or type_ == "*"
                inputs[socket["name"]] = [str(origin), origin_slot]
        assert (node["type"], inputs) == (api[node_id]["class_type"], api[node_id]["inputs"])


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap_and_links_lead_to_the_right(name):
    ui = ui_file(name)
    boxes = {n["id"]: (n["pos"][0], n["pos"][1] - 30, *np.add(n["pos"], n["size"])) for n in ui["nodes"]}
    pairs = [(a, b) for a in boxes for b in boxes if a < b]
    for a, b in pairs:
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = boxes[a], boxes[b]
        assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0, (a, b)
    for _, origin, _, target, *_ in ui["links"]:
        assert boxes[origin][0] <= boxes[target][0]
    for x0, y0, x1, y1 in boxes.values():
        inside = [g for g in ui["groups"] if g["bounding"][0] <= x0 and x1 <= g["bounding"][0] + g["bounding"][2]]
        assert len(inside) == 1 and y1 <= inside[0]["bounding"][3] and y0 >= 0
