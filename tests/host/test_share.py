"""Recipes from and for other machines: whose they are, shown on the page and in pictures' files; what is missing."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
from graphs import Graph, to_api
from host import HostError, Server
from PIL import Image
from small_graphs import AVATARS, Avatars, refusal
from test_debias import MIXES, debias

from difflens_core.files import difflens_info, digest, load_tensors, save_tensors
from difflens_core.report import with_provenance
from difflens_core.steer import load_recipe, save_recipe

AGE = AVATARS / "difflens_recipes" / "avatars_age.safetensors"
EVEN = MIXES["even mix"][0]


@pytest.fixture(scope="module")
def recipes(server):
    folder = server.base / "models" / "difflens_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_workflow(server: Server, graph: Graph) -> dict:
    """Run a graph as the page sends it: with the workflow that goes into its pictures' files."""
    body = {"prompt": to_api(graph), "extra_data": {"extra_pnginfo": {"workflow": {"id": "mine"}}}}
    reply = json.loads(server.request("/prompt", json.dumps(body).encode()))
    return server.wait(reply["prompt_id"])


def saved(graph: Avatars, drawn) -> None:
    graph.add("SaveImage", images=graph.pictures(drawn)[0], filename_prefix="shared")


def in_files(server: Server, entry: dict) -> list[dict]:
    pictures = [Image.open(io.BytesIO(server.get_image(reference))) for reference in server.images(entry)]
    return [picture.text for picture in pictures if "workflow" in picture.text]


def test_a_recipe_is_passed_on_with_its_licence_and_told_in_every_picture(server, recipes):
    graph = Avatars(pictures=2)
    pictures = graph.pictures(graph.draw())
    graph.add(
        "DiffLensSaveRecipe", recipe=graph.recipe(), name="shared", author="Kai", licence="CC-BY-4.0",
        model_name="The avatars", example=pictures[0],
    )  # fmt: skip
    server.run(to_api(graph))
    path = recipes / "shared.safetensors"
    assert 500 < path.stat().st_size - AGE.stat().st_size < 30_000

    graph = Avatars(pictures=1)
    recipe = graph.add("DiffLensLoadRecipe", recipe_name="shared.safetensors")
    saved(graph, graph.draw(graph.steer(recipe[0])[0]))
    entry = with_workflow(server, graph)
    assert entry["outputs"][str(recipe.id)]["images"]  # the example, on Load Recipe
    (first,) = in_files(server, entry)
    (told,) = json.loads(first["difflens_recipes"])
    assert told == {
        "name": "shared.safetensors", "fingerprint": digest(path.read_bytes()), "attribute": "age",
        "classes": ["young", "adult", "senior"], "model": difflens_info(path)["model"], "author": "Kai",
        "licence": "CC-BY-4.0", "model_name": "The avatars", "calibrated": False, "of_0.4": False,
    }  # fmt: skip
    assert json.loads(first["workflow"]) == {"id": "mine"}

    saved(graph, graph.draw(graph.steer(recipe[0])[0], seed=4))  # Load Recipe is not run again
    assert all(
        json.loads(text["difflens_recipes"]) == [told] for text in in_files(server, with_workflow(server, graph))
    )


def test_only_graphs_with_a_workflow_and_listed_recipes_are_told_of(inside):
    tell = inside.pack_module("nodes.host.provenance").with_recipes
    node = {"class_type": "DiffLensDebias", "inputs": {"recipe": "avatars_age.safetensors", "recipe.mix": "even mix"}}
    linked = {"class_type": "DiffLensLoadRecipe", "inputs": {"recipe_name": ["7", 0]}}
    gone = {"class_type": "DiffLensLoadRecipe", "inputs": {"recipe_name": "gone.safetensors"}}
    for prompt, names in (({"1": node, "2": linked, "3": gone}, ["avatars_age.safetensors"]), ({"1": linked}, None)):
        beside = {"workflow": {}}
        tell({"prompt": prompt, "extra_data": {"extra_pnginfo": beside}})
        assert names == (beside.get("difflens_recipes") and [one["name"] for one in beside["difflens_recipes"]])
    for data in ({"prompt": {"1": node}}, {"prompt": {"1": node}, "extra_data": {}}, {}, {"prompt": [1]}):
        assert tell(json.loads(json.dumps(data))) == data


def test_a_recipe_that_is_not_here_stops_only_what_needs_it(server):
    graph = Avatars(pictures=1)
    plain = graph.save(graph.draw())
    graph.save(graph.draw_steered("from_kai"))
    reply = json.loads(server.request("/prompt", json.dumps({"prompt": to_api(graph)}).encode()))
    told = json.dumps(reply["node_errors"])
    assert (
        "'from_kai.safetensors' is not on this machine: put it into " in told and "difflens_recipes or choose" in told
    )
    assert "what does not need it runs all the same" in told
    assert server.wait(reply["prompt_id"])["outputs"][str(plain.id)]
    graph = Avatars(pictures=1)
    graph.save(graph.draw_steered("from_kai"))
    with pytest.raises(HostError, match="is not on this machine"):
        server.run(to_api(graph))
    graph = Avatars(pictures=1)
    graph.save(graph.draw(debias(graph, EVEN, recipe="from_kai.safetensors")[0]))
    told = refusal(server, graph)
    assert "from_kai.safetensors was not found. Put it into " in told and "or bypass this node (Ctrl+B)" in told


def test_what_the_page_shows_of_a_recipe(inside, tmp_path, monkeypatch):
    import folder_paths
    from comfy_execution.utils import CurrentNodeContext

    monkeypatch.setitem(folder_paths.folder_names_and_paths, inside.host.RECIPES, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    recipe = load_recipe(AGE)
    shutil.copy(AGE, tmp_path / "plain.safetensors")
    save_recipe(tmp_path / "licensed.safetensors", with_provenance(recipe, "Kai", "CC-BY-NC-4.0", "SDXL"))
    tensors, info = load_tensors(AGE, "recipe")
    save_tensors(tmp_path / "old.safetensors", "recipe", tensors, {k: v for k, v in info.items() if k != "hold"})
    other = with_provenance(replace(recipe, model="other"), "Kai", "MIT", "SDXL")
    save_recipe(tmp_path / "other.safetensors", other)
    broken = replace(recipe, info={"example": "data:image/jpeg;base64,AAAA"})
    save_recipe(tmp_path / "broken.safetensors", broken)
    load, debiased = inside.pack_module("nodes.load").LoadRecipe, inside.pack_module("nodes.debias").Debias
    model = inside.host.load_unconditional(inside.host.find_model("avatars.safetensors"))
    shown = inside.pack_module("nodes.host.progress")._told

    def on_node(name: str, debias: bool = False) -> str:
        with CurrentNodeContext("prompt", "7"):
            if debias:
                debiased.execute(model, 1.0, {"recipe": f"{name}.safetensors", "mix": {"mix": "even mix"}})
            else:
                load.execute(f"{name}.safetensors")
        return shown.pop("7")

    assert on_node("plain").startswith("Recipe for age (young, adult, senior)")
    assert "SDXL, made by Kai. Licence: CC-BY-NC-4.0." in on_node("licensed")
    assert "made by version 0.4 or before" in on_node("old")
    told = on_node("other", debias=True)
    assert told.startswith("The recipe for age was made on other weights (SDXL) than this model's")
    assert told.endswith("Licence: MIT.")
    assert "Made on this model are: broken.safetensors, licensed.safetensors, old.safetensors, plain" in told
    assert on_node("broken").startswith("The recipe's example cannot be shown")
