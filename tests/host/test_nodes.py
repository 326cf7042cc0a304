"""What ComfyUI knows about the pack: its nodes, their help pages, the files and workflows that it ships."""

from __future__ import annotations

import io
import json
import urllib.parse
from urllib.error import HTTPError

import pytest
from host import PACK_NAME
from PIL import Image
from small_graphs import NAMES

NODES = (
    "LoadModel", "LoadSAE", "LoadFeatures", "LoadClassifier", "LoadRecipe", "SaveRecipe", "Capture", "LoadActivations",
    "TrainSAE", "Classify", "TrainProbes", "Attribute", "SiteScan", "RankByEffect", "Steer", "Report", "Compare",
    "ZeroShot", "DDIMSigmas", "ReferenceSampler", "LoadPromptedModel", "Calibrate", "Plan", "CrossEffects", "Diagnose",
    "Prompts", "Debias", "Judge", "Explore",
)  # fmt: skip


def test_exactly_our_nodes_are_registered(object_info):
    assert {name for name in object_info if name.startswith("DiffLens")} == {f"DiffLens{name}" for name in NODES}


@pytest.mark.parametrize("name", NODES)
def test_every_node_explains_itself(server, object_info, name):
    info = object_info[f"DiffLens{name}"]
    assert info["python_module"] == f"custom_nodes.{PACK_NAME}"
    assert info["description"] and info["category"] == "DiffLens" and info["display_name"] != info["name"]
    for kind in ("required", "optional"):
        for input_name, declared in info["input"].get(kind, {}).items():
            assert declared[1].get("tooltip"), f"input {input_name} has no tooltip"
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])
    page = server.request(f"/extensions/{PACK_NAME}/docs/DiffLens{name}.md").decode()
    assert info["display_name"] in page and len(page) > 200


def test_help_comes_in_whatever_language_the_page_asks_for(server):
    """Otherwise each page that is opened leaves an error on the browser's console first."""
    path = f"/extensions/{PACK_NAME}/docs/DiffLensDebias"
    page = server.request(f"{path}.md")
    assert server.request(f"{path}/en.md") == page == server.request(f"{path}/pt-BR.md")
    with pytest.raises(HTTPError, match="404"):
        server.request(f"/extensions/{PACK_NAME}/docs/DiffLensNothing/en.md")


def test_each_type_of_ours_has_a_colour_in_the_page(server, object_info):
    outputs = {kind for node in object_info.values() for kind in node["output"] if str(kind).startswith("DIFFLENS_")}
    coloured = server.request(f"/extensions/{PACK_NAME}/colours.js").decode()
    assert "DIFFLENS_RECIPE" in outputs and not [kind for kind in outputs if f"{kind}:" not in coloured]


def test_seeds_stay_as_they_are_from_run_to_run(object_info):
    """ComfyUI makes a seed random after every run unless it is told otherwise: every run would deal and train anew."""
    seeds = {
        name: options.get("control_after_generate")
        for name, node in object_info.items() if name.startswith("DiffLens")
        for kind in ("required", "optional")
        for socket, (_, options, *_) in ((key, (*value, {})) for key, value in node["input"].get(kind, {}).items())
        if socket == "seed"
    }  # fmt: skip
    assert "DiffLensSteer" in seeds and "DiffLensTrainSAE" in seeds and set(seeds.values()) == {"fixed"}


def test_the_shipped_files_are_listed(object_info):
    for node, name, files in (
        ("LoadModel", "model_name", ["avatars"]),
        ("LoadPromptedModel", "model_name", ["prompted_avatars"]),
        ("LoadSAE", "sae_name", ["avatars"]),
        ("LoadClassifier", "classifier_name", ["avatars"]),
        ("LoadRecipe", "recipe_name", ["avatars_presentation", "avatars_age", "avatars_skin_tone"]),
    ):
        options = object_info[f"DiffLens{node}"]["input"]["required"][name][1]["options"]
        assert {f"{file}.safetensors" for file in files} <= set(options)


def test_workflows_are_templates(server):
    listed = json.loads(server.request("/workflow_templates"))[PACK_NAME]
    assert sorted(listed) == list(NAMES)
    for name in NAMES:
        path = f"/api/workflow_templates/{PACK_NAME}/{urllib.parse.quote(name)}"
        assert json.loads(server.request(f"{path}.json"))["nodes"]
        assert Image.open(io.BytesIO(server.request(f"{path}.jpg"))).width == 512
