"""The pack in a real ComfyUI: nodes, help pages, the shipped workflows and their numbers, bad input and Cancel."""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import FOLDER, GRAPHS, Graph, Node, sampler, steer, to_api, to_ui
from host import PACK_NAME, HostError, Server
from PIL import Image
from safetensors.torch import load_file, save_file

from difflens_core.activations import open_store
from difflens_core.files import fingerprint
from difflens_core.networks import capture_pictures, load_denoiser, sample, save_denoiser, start_noise
from difflens_core.sae import SparseAutoencoder, load_sae
from difflens_core.steer import Steering, load_recipe, recipe_from_features, save_recipe
from difflens_core.targets import Targets

AVATARS = FOLDER.parent / "models" / "avatars"
NODES = (
    "LoadModel", "LoadSAE", "LoadFeatures", "LoadClassifier", "LoadRecipe", "SaveRecipe", "Capture", "LoadActivations",
    "TrainSAE", "Classify", "TrainProbes", "Attribute", "SiteScan", "RankByEffect", "Steer", "Report", "Compare",
    "ZeroShot", "DDIMSigmas", "ReferenceSampler", "LoadPromptedModel", "Calibrate", "Plan", "CrossEffects", "Diagnose",
)  # fmt: skip
NAMES = (
    "01 debias the avatars", "02 find the bias features", "03 dose response", "04 debias a prompt",
    "05 paper unconditional", "06 paper Stable Diffusion", "07 three attributes at once", "08 where is it decided",
    "09 which features count", "10 why does it not work",
)  # fmt: skip
# What 05 and 06 ask the user to bring, by the input that names it.
BROUGHT = {
    "model_name": {"celebahq_p2.pt"}, "ckpt_name": {"v1-5-pruned-emaonly.safetensors"}, "sae_name": {"p2", "sd15"},
    "folder": {"p2/gender", "sd15/age"}, "classifier_name": {"res34_fair_align_multi_7_20190809.pt"},
}  # fmt: skip


def ui_file(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api_file(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name.replace(' ', '_')}.json").read_text(encoding="utf-8"))


def find(prompt: dict, class_type: str, **inputs: object) -> str:
    """Id of the one node of that type with those inputs."""
    (found,) = [i for i, n in prompt.items() if n["class_type"] == class_type and inputs.items() <= n["inputs"].items()]
    return found


def read_image(server: Server, entry: dict, node_id: str) -> np.ndarray:
    (reference,) = entry["outputs"][node_id]["images"]
    return np.asarray(Image.open(io.BytesIO(server.get_image(reference))).convert("RGB"))


def read_report(prompt: dict, entry: dict) -> dict:
    source = [find(prompt, "DiffLensReport"), 1]
    return json.loads(entry["outputs"][find(prompt, "PreviewAny", source=source)]["text"][0])


# --- what ComfyUI knows about the pack ---


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
        if name[:2] not in ("05", "06"):  # which nobody can run without the weights
            assert Image.open(io.BytesIO(server.request(f"{path}.jpg"))).width == 512


# --- the workflow files ---


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


# --- the workflows run ---


@pytest.fixture(scope="session")
def ran(server):
    """Function that runs a shipped workflow, once in a session: (prompt, history entry)."""
    done = {}

    def run(name: str) -> tuple[dict, dict]:
        if name not in done:
            prompt = api_file(name)
            done[name] = prompt, server.run(prompt, timeout=1200)
        return done[name]

    return run


@pytest.mark.parametrize(
    ("name", "count", "columns", "lines"),
    [(NAMES[0], 16, 8, 4), (NAMES[1], 32, 16, 4), (NAMES[2], 8, 8, 5), (NAMES[6], 48, 16, 6), (NAMES[8], 8, 8, 3)],
)
def test_a_workflow_makes_its_pictures(server, ran, name, count, columns, lines):
    prompt, entry = ran(name)
    grid = read_image(server, entry, find(prompt, "SaveImage", images=[find(prompt, "DiffLensCompare"), 0]))
    assert grid.shape[1] == columns * 134 + 6 and grid.shape[0] > lines * 134
    chart = read_image(server, entry, find(prompt, "SaveImage", images=[find(prompt, "DiffLensReport"), 2]))
    assert chart.shape == (440, 720, 3)
    for node_id, output in entry["outputs"].items():
        for _ in output.get("images", []):
            assert read_image(server, entry, node_id).std() > 10, f"node {node_id} made an empty picture"
    report = read_report(prompt, entry)
    assert report["n"] == count and sum(report["before"]["shares"]) == pytest.approx(1)


def test_one_recipe_debiases_every_prompt(server, ran):
    prompt, entry = ran(NAMES[3])
    titles = {node.get("_meta", {}).get("title"): node_id for node_id, node in prompt.items()}
    for job in ("Doctor", "Nurse", "Firefighter", "Receptionist"):
        report = json.loads(entry["outputs"][titles[f"{job}: the report for machines (JSON)"]]["text"][0])
        assert report["n"] == 16 and report["before"]["fd"] > 0.3 > 0.1 > report["after"]["fd"], job
        assert report["after"]["success"] >= 0.9 and report["kept"]["occupation"] >= 0.9, job
    grid = read_image(server, entry, find(prompt, "SaveImage", images=[find(prompt, "DiffLensCompare"), 0]))
    assert grid.shape[1] == 16 * 134 + 6 and grid.std() > 10


def test_the_workflows_of_the_paper_name_what_is_missing(server):
    for name, missing in (("05 paper unconditional", "celebahq_p2.pt"), ("06 paper Stable Diffusion", "v1-5-pruned")):
        with pytest.raises(HostError, match=missing):
            server.run(api_file(name))


def test_debiasing_brings_the_mix_to_the_target(ran):
    report = read_report(*ran(NAMES[0]))
    assert report["before"]["fd"] > 0.2 and report["after"]["fd"] < 0.5 * report["before"]["fd"]
    assert report["after"]["success"] >= 0.85
    assert report["kept"]["background"] >= 0.8 and report["kept"]["clothes"] >= 0.8


def test_features_found_from_scratch_steer(server, ran):
    prompt, entry = ran(NAMES[1])
    report = read_report(prompt, entry)
    assert report["after"]["fd"] < 0.7 * report["before"]["fd"] and report["after"]["success"] >= 0.75
    (quality,) = entry["outputs"][find(prompt, "PreviewAny", source=[find(prompt, "DiffLensTrainSAE"), 2])]["text"]
    assert 0 < float(quality.split("FVU ")[1].split(",")[0]) < 0.5
    recipes = server.object_info()["DiffLensLoadRecipe"]["input"]["required"]["recipe_name"][1]["options"]
    assert "my_presentation.safetensors" in recipes


def test_the_dose_counts(ran):
    report = read_report(*ran(NAMES[2]))
    assert report["after"]["success"] >= 0.85 > 0.5 > report["before"]["shares"][2]


def test_three_attributes_are_balanced_at_once_by_the_fewest_changes(ran):
    prompt, entry = ran(NAMES[6])
    report = read_report(prompt, entry)
    joint = report["after"]["joint"]
    assert len(joint["cells"]) == 24 and joint["fd_hard"] < 0.06 < 0.3 < report["before"]["joint"]["fd_hard"]
    assert report["after"]["success"] >= 0.9 and max(joint["counts"]) <= 4
    (plan,) = entry["outputs"][find(prompt, "PreviewAny", source=[find(prompt, "DiffLensPlan"), 1])]["text"]
    moved = int(plan.split()[0])
    before = np.array(report["before"]["joint"]["counts"])
    assert moved == np.abs(before - 2).sum() / 2, "the total variation distance, in pictures"
    assert report["changes"]["changed"] == pytest.approx(moved / 48), "the others stay as they are"
    cross = find(prompt, "DiffLensCrossEffects")
    (matrix,) = entry["outputs"][find(prompt, "PreviewAny", source=[cross, 0])]["text"]
    rows = {line.split("  ")[0]: line for line in matrix.splitlines()[2:]}
    assert rows.keys() == {"presentation", "age", "skin_tone", "all together"}


def test_the_scan_tells_where_it_is_decided(server, ran):
    prompt, entry = ran(NAMES[7])
    scan = find(prompt, "DiffLensSiteScan")
    (table,) = entry["outputs"][find(prompt, "PreviewAny", source=[scan, 0])]["text"]
    rows = [line.split() for line in table.splitlines()[2:]]
    success = {(row[0], row[1]): float(row[2]) for row in rows if row[1] in ("whole", "reversed")}
    assert len(rows) == 5 * 5 and success["middle_block", "whole"] >= 40 >= 15 >= success["middle_block", "reversed"]
    chart = read_image(server, entry, find(prompt, "SaveImage", images=[scan, 2]))
    assert chart.shape == (440, 720, 3) and chart.std() > 10


def test_few_features_that_count_steer(ran):
    prompt, entry = ran(NAMES[8])
    report = read_report(prompt, entry)
    assert report["after"]["success"] >= 0.85 > report["before"]["shares"][1]
    ranked = find(prompt, "DiffLensRankByEffect")
    (table,) = entry["outputs"][find(prompt, "PreviewAny", source=[ranked, 2])]["text"]
    assert len(table.splitlines()) == 2 + 120


def test_the_diagnosis_calls_out_the_control_alone(server, ran):
    prompt, entry = ran(NAMES[9])
    for recipe, verdict in (("avatars_presentation", "Nothing wrong found."), ("random", "Wrong features: ")):
        (loaded,) = [i for i, n in prompt.items() if recipe in n["inputs"].get("recipe_name", "")]
        node = find(prompt, "DiffLensDiagnose", recipe=[loaded, 0])
        (text,) = entry["outputs"][find(prompt, "PreviewAny", source=[node, 0])]["text"]
        assert text.startswith(f"presentation: {verdict}"), text
        assert read_image(server, entry, find(prompt, "SaveImage", images=[node, 2])).std() > 10


# --- small graphs of our own ---


class Small(Graph):
    """A graph with the avatars loaded."""

    def __init__(self, pictures: int = 2, size: int = 64, model: str = "avatars", recipe: str = "avatars_age"):
        super().__init__("small")
        self.group("all")
        self.model = self.add("DiffLensLoadModel", model_name=f"{model}.safetensors")
        self.latent = self.add("EmptyLatentImage", width=size, height=size, batch_size=pictures)
        self.recipe_name = f"{recipe}.safetensors"

    def classifier(self) -> Node:
        return self.add("DiffLensLoadClassifier", classifier_name="avatars.safetensors")

    def sample(self, steered: bool = False, seed: int = 3, **settings: object) -> Node:
        """A KSampler of four steps, behind a Steer if asked."""
        model = self.model[0]
        if steered:
            recipe = self.add("DiffLensLoadRecipe", recipe_name=self.recipe_name)
            node = steer(self, None, model, recipe[0])
            node.inputs |= settings
            model = node[0]
        drawn = sampler(self, None, model, self.model[1], self.latent, seed)
        drawn.inputs["steps"] = 4
        return drawn

    def pictures(self, drawn: Node) -> Node:
        return self.add("VAEDecode", samples=drawn[0], vae=self.model[2])

    def save(self, drawn: Node) -> Node:
        return self.add("SaveLatent", samples=drawn[0], filename_prefix="latents/test")

    def capture(self, **settings: object) -> Node:
        inputs = {
            "pictures": 4,
            "steps": 3,
            "sampler_name": "euler",
            "scheduler": "simple",
            "seed": 0,
            "site": "middle_block",
        }
        return self.add(
            "DiffLensCapture", model=self.model[0], positive=self.model[1], latent_image=self.latent[0],
            vae=self.model[2], **{**inputs, **settings},
        )  # fmt: skip

    def train(self, captured: Node, steps: int, save_as: str = "") -> Node:
        return self.add(
            "DiffLensTrainSAE", activations=captured[0], latents=64, k=8, steps=steps, batch_size=64,
            learning_rate=0.001, seed=0, save_as=save_as,
        )  # fmt: skip

    def report(self, before: Node, after: Node | None = None, attribute: str = "age", target: str = "uniform") -> Node:
        more = {"after": after[0]} if after else {}
        return self.add(
            "DiffLensReport",
            classifier=self.classifier()[0],
            attribute=attribute,
            target=target,
            before=before[0],
            **more,
        )


def latents(server: Server, entry: dict, node: Node) -> torch.Tensor:
    (reference,) = entry["outputs"][str(node.id)]["latents"]
    return load_file(server.output_dir / reference["subfolder"] / reference["filename"])["latent_tensor"]


def test_strength_0_is_bit_identical_to_no_node(server):
    graph = Small(pictures=3)
    plain, zero, one = (graph.save(graph.sample(*how)) for how in ((), (True,), (True,)))
    steers = [node for node in graph.nodes if node.type == "DiffLensSteer"]
    steers[0].inputs["strength"] = 0.0
    entry = server.run(to_api(graph))
    plain, zero, one = (latents(server, entry, node) for node in (plain, zero, one))
    assert plain.shape == (3, 3, 64, 64) and plain.std() > 0.1
    assert torch.equal(plain, zero) and not torch.equal(plain, one)


def foreign_sae(server: Server, name: str) -> None:
    """An SAE as sparsify writes it, in a folder of the user's."""
    folder = server.base / "models" / "difflens_saes" / name
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": torch.ones(8, 256), "encoder.bias": torch.ones(8)}
    tensors |= {"W_dec": torch.ones(8, 256), "b_dec": torch.ones(256)}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text('{"expansion_factor": 32, "num_latents": 8, "k": 2, "d_in": 256}')


def test_an_sae_of_another_program_is_listed_by_its_folder_and_loads(server):
    foreign_sae(server, "mine/middle_block.0")
    foreign_sae(server, "named by the user")
    options = server.object_info()["DiffLensLoadSAE"]["input"]["required"]["sae_name"][1]["options"]
    assert {"mine/middle_block.0", "named by the user", "avatars.safetensors"} <= set(options)
    assert not [name for name in options if name.endswith(("sae.safetensors", ".json"))]
    graph = Graph("saes")
    graph.group("all")
    shown = []
    for name, site in (("mine/middle_block.0", ""), ("named by the user", "middle_block"), ("avatars.safetensors", "")):
        loaded = graph.add("DiffLensLoadSAE", sae_name=name, site=site)
        shown.append(graph.add("PreviewAny", source=loaded[1]))
    entry = server.run(to_api(graph))
    texts = [entry["outputs"][str(node.id)]["text"][0] for node in shown]
    assert "sparsify" in texts[0] and "topk, k 2" in texts[0] and "the output of middle_block.0" in texts[0]
    assert "the output of middle_block\n" in texts[1] + "\n" and "format: DiffLens" in texts[2]


def feature_files(server: Server, sae: SparseAutoencoder) -> dict[str, list[int]]:
    """Files as the reference DiffLens writes them, in a folder below an SAE's; returns 12 latents of each class."""
    folder = server.base / "models" / "difflens_saes" / "paper" / "age"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = shipped("age")
    chosen = {name: recipe.features[own][:12].tolist() for name, own in zip(recipe.classes, recipe.member, strict=True)}
    for name, latents in chosen.items():
        positions = torch.arange(len(latents)) % 5
        torch.save(
            torch.cat([positions * sae.latents + torch.tensor(latents), torch.tensor(latents[:1])]),
            folder / f"{name}.pt",
        )
    save_file({"encoder": torch.ones(1)}, folder.parent / "odd.safetensors")
    return chosen


def test_feature_files_of_the_paper_steer_a_stock_graph(server):
    sae = load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")
    chosen = feature_files(server, sae)
    info = server.object_info()
    folder = str(Path("paper", "age"))
    assert info["DiffLensLoadFeatures"]["input"]["required"]["folder"][1]["options"] == [folder]
    names = info["DiffLensLoadSAE"]["input"]["required"]["sae_name"][1]["options"]
    assert not [name for name in names if name.endswith(".pt")] and str(Path("paper", "odd.safetensors")) in names

    graph = Small(pictures=4)
    loaded = graph.add("DiffLensLoadSAE", sae_name="avatars.safetensors")

    def steered(with_sae: bool, **settings: object) -> tuple[Node, Node]:
        inputs = {"attribute": "", "classes": "young, senior", "features_per_class": "12, 7", "strength": "0.5, 3"}
        features = graph.add("DiffLensLoadFeatures", folder=folder, sae=loaded[0], **{**inputs, **settings})
        node = steer(graph, None, graph.model[0], features[0])
        node.inputs |= {"sae": loaded[0]} if with_sae else {}
        drawn = sampler(graph, None, node[0], graph.model[1], graph.latent, 3)
        drawn.inputs["steps"] = 4
        return drawn, features

    scaled, features = steered(True, mode="scale")
    saved = graph.save(scaled), graph.save(steered(False, mode="add own fixed")[0])
    shown = graph.add("PreviewAny", source=features[1])
    entry = server.run(to_api(graph))
    (text,) = entry["outputs"][str(shown.id)]["text"]
    assert text.startswith("age, at middle_block\nyoung: 12 features, #") and "\nsenior: 7 features, #" in text
    wanted = {"young": chosen["young"], "senior": chosen["senior"][:7]}
    plain = sampled_by_the_core([], 4, 3)
    for node, mode, given in zip(saved, ("scale", "add own fixed"), (sae, None), strict=True):
        expected = sampled_by_the_core([recipe_from_features(sae, "age", wanted, mode, (0.5, 3.0))], 4, 3, sae=given)
        torch.testing.assert_close(latents(server, entry, node).clamp(-1, 1), expected, atol=2e-3, rtol=0)
        assert float((expected - plain).abs().amax(dim=(1, 2, 3)).min()) > 0.05

    for settings, phrase in (
        ({"mode": "scale"}, "Steer: recipe for age: mode 'scale' must know where the latents are active"),
        ({"mode": "scale", "strength": "1, 2, 3"}, "Load Feature Files: strength .* 2 in the order young, senior"),
        ({"mode": "scale", "classes": "old"}, "Load Feature Files: age has no feature file of old, but adult, senior"),
    ):
        graph = Small()
        loaded = graph.add("DiffLensLoadSAE", sae_name="avatars.safetensors")
        graph.save(steered(False, **settings)[0])
        with pytest.raises(HostError, match=phrase):
            server.run(to_api(graph))


@pytest.fixture(scope="session")
def other_site(server):
    """The recipe for age, moved to a site behind the middle block where it does something else."""
    folder = server.base / "models" / "difflens_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(AVATARS / "difflens_recipes" / "avatars_age.safetensors")
    save_recipe(folder / "behind.safetensors", replace(recipe, site="after_middle.0", mode="add"))


def sampled_by_the_core(recipes: list, pictures: int, seed: int, **more: object) -> torch.Tensor:
    """What Small.sample draws with those recipes for the first targets of a uniform mix, without ComfyUI."""
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    edits = []
    for recipe in recipes:
        shares = (1 / len(recipe.classes),) * len(recipe.classes)
        edits.append(Steering(recipe, Targets(recipe.attribute, recipe.classes, shares).of, **more))
    return sample(model, start_noise(pictures, seed), 4, edits)


def shipped(attribute: str, **settings: object):
    recipe = load_recipe(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")
    return replace(recipe, **settings)


def test_recipes_compose_in_node_order_at_one_site_and_at_two(server, other_site):
    graph = Small(pictures=4)
    model = graph.model[0]
    for name in ("avatars_age", "avatars_skin_tone", "behind"):
        recipe = graph.add("DiffLensLoadRecipe", recipe_name=f"{name}.safetensors")
        model = steer(graph, None, model, recipe[0])[0]
    drawn = sampler(graph, None, model, graph.model[1], graph.latent, 3)
    drawn.inputs["steps"] = 4
    saved = graph.save(drawn)
    found = latents(server, server.run(to_api(graph)), saved).clamp(-1, 1)
    recipes = [shipped("age"), shipped("skin_tone"), shipped("age", site="after_middle.0", mode="add")]
    torch.testing.assert_close(found, sampled_by_the_core(recipes, 4, 3), atol=2e-3, rtol=0)
    for fewer in (recipes[:2], recipes[1:]):
        assert float((found - sampled_by_the_core(fewer, 4, 3)).abs().max()) > 0.1


def test_the_sae_and_a_mask_on_steer_do_what_the_core_does(server):
    graph = Small(pictures=3)
    sae = graph.add("DiffLensLoadSAE", sae_name="avatars.safetensors")
    left = graph.add("SolidMask", value=1.0, width=32, height=64)
    black = graph.add("SolidMask", value=0.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=black[0], source=left[0], x=0, y=0, operation="add")
    full = graph.save(graph.sample(steered=True, mode="move", sae=sae[0]))
    masked = graph.save(graph.sample(steered=True, mode="move", sae=sae[0], mask=mask[0]))
    nothing = graph.save(graph.sample(steered=True, mode="move", mask=black[0]))
    plain = graph.save(graph.sample())
    entry = server.run(to_api(graph))
    full, masked, nothing, plain = (latents(server, entry, node) for node in (full, masked, nothing, plain))
    assert torch.equal(nothing, plain)
    recipe, more = [shipped("age", mode="move")], {"sae": load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")}
    torch.testing.assert_close(full.clamp(-1, 1), sampled_by_the_core(recipe, 3, 3, **more), atol=2e-3, rtol=0)
    half = torch.zeros(1, 64, 64)
    half[..., :32] = 1
    expected = sampled_by_the_core(recipe, 3, 3, mask=half, **more)
    torch.testing.assert_close(masked.clamp(-1, 1), expected, atol=2e-3, rtol=0)
    assert float((masked - full).abs().max()) > 0.1


def test_the_conditioning_to_steer_can_be_chosen(server):
    """Positive and negative are the same here: steering both at cfg 2 is steering the one at cfg 1."""
    graph = Small(pictures=2)
    saved = {}
    for name, cfg in (("positive", 1.0), ("negative", 1.0), ("positive", 2.0), ("negative", 2.0), ("both", 2.0)):
        drawn = graph.sample(steered=True, conditioning=name)
        drawn.inputs["cfg"] = cfg
        saved[name, cfg] = graph.save(drawn)
    saved["none", 1.0] = graph.save(graph.sample())
    entry = server.run(to_api(graph))
    found = {key: latents(server, entry, node) for key, node in saved.items()}
    assert torch.equal(found["negative", 1.0], found["none", 1.0])
    torch.testing.assert_close(found["both", 2.0], found["positive", 1.0], atol=2e-3, rtol=0)
    for other in (("positive", 2.0), ("negative", 2.0)):
        assert float((found[other] - found["positive", 1.0]).abs().max()) > 0.1
    assert not torch.equal(found["positive", 2.0], found["negative", 2.0])


def experiment(graph: Small, type: str, **settings: object) -> Node:
    return graph.add(
        type, model=graph.model[0], positive=graph.model[1], latent_image=graph.latent[0], vae=graph.model[2],
        classifier=graph.classifier()[0], steps=3, sampler_name="euler", scheduler="simple", seed=0, **settings,
    )  # fmt: skip


def test_the_site_scan_finds_sites_by_itself_and_shows_that_they_steer(server):
    graph = Small(pictures=16)
    scan = experiment(graph, "DiffLensSiteScan", attribute="age", sites="", pictures=48, per_class=1, strength=1.0)
    words, numbers = graph.add("PreviewAny", source=scan[0]), graph.add("PreviewAny", source=scan[1])
    entry = server.run(to_api(graph))
    rows = json.loads(entry["outputs"][str(numbers.id)]["text"][0])["rows"]
    sites = list(dict.fromkeys(row["site"] for row in rows))
    assert sites == [
        "encoder", "down", "middle_block.0", "middle_block", "after_middle.0", "after_middle", "up", "decoder.0",
        "decoder",
    ]  # fmt: skip
    whole = {row["site"]: row["success"] for row in rows if row["part"] == "whole"}
    assert whole["middle_block"] >= 0.5
    assert all(row["success"] <= 0.5 for row in rows if row["part"] == "reversed")
    assert len(entry["outputs"][str(words.id)]["text"][0].splitlines()) == 2 + len(rows) == 2 + 5 * 9
    assert read_image(server, entry, str(scan.id)).shape == (440, 720, 3)


def test_features_are_ranked_by_their_effect(server):
    graph = Small(pictures=32, recipe="avatars_presentation")
    recipe = graph.add("DiffLensLoadRecipe", recipe_name=graph.recipe_name)
    ranked = experiment(
        graph, "DiffLensRankByEffect", recipe=recipe[0], change="amplify", strength=5.0, pictures=2,
        features_per_class=7,
    )  # fmt: skip
    graph.add("DiffLensSaveRecipe", recipe=ranked[0], name="by_effect")
    table = graph.add("PreviewAny", source=ranked[2])
    entry = server.run(to_api(graph), timeout=600)
    assert len(entry["outputs"][str(table.id)]["text"][0].splitlines()) == 2 + 120
    kept = load_recipe(server.base / "models" / "difflens_recipes" / "by_effect.safetensors")
    assert kept.member.sum(dim=1).tolist() == [7, 7] and kept.info["ranking"] == "amplify, 2 pictures a feature"
    assert set(kept.features.tolist()) < set(shipped("presentation").features.tolist())


def diagnose(graph: Small, **settings: object) -> Node:
    recipe = graph.add("DiffLensLoadRecipe", recipe_name=graph.recipe_name)
    sae = graph.add("DiffLensLoadSAE", sae_name="avatars.safetensors")
    node = experiment(graph, "DiffLensDiagnose", recipe=recipe[0], sae=sae[0], pictures=4, scan_sites=False)
    node.inputs |= settings
    return node


def captured_and_labelled(graph: Small, attribute: str, **settings: object) -> dict:
    captured = graph.capture(**{"pictures": 32, "steps": 3, **settings})
    labels = graph.add("DiffLensClassify", images=captured[1], classifier=graph.classifier()[0], attribute=attribute)
    return {"activations": captured[0], "labels": labels[0]}


def test_a_good_recipe_and_random_features_are_told_apart(server):
    graph = Small(pictures=32, recipe="avatars_presentation")
    good = diagnose(graph, steps=8, scan_sites=True, **captured_and_labelled(graph, "presentation", pictures=64))
    graph.recipe_name = str(Path("controls", "presentation_random.safetensors"))
    bad = diagnose(graph, steps=8)
    shown = {(node.id, slot): graph.add("PreviewAny", source=node[slot]) for node in (good, bad) for slot in (0, 1)}
    entry = server.run(to_api(graph), timeout=900)
    text = {key: entry["outputs"][str(node.id)]["text"][0] for key, node in shown.items()}
    assert "Wrong features" not in text[good.id, 0]
    assert text[bad.id, 0].startswith("presentation: Wrong features: they change the pictures")
    found = {check["name"]: check for check in json.loads(text[good.id, 1])["checks"]}
    assert [check["verdict"] for check in found.values()] == ["good"] * 4, text[good.id, 0]
    assert len(found["right site"]["figures"]["sites"]) == 5
    assert (
        found["right features"]["figures"]["best"][-1] >= 0.8 > 0.2 >= found["right features"]["figures"]["random"][-1]
    )
    assert found["features disentangled"]["figures"]["fvu"] < 0.3
    found = {check["name"]: check["verdict"] for check in json.loads(text[bad.id, 1])["checks"]}
    assert found == {
        "right site": "not checked", "features disentangled": "not checked", "right features": "bad",
        "dose and effect": "bad",
    }  # fmt: skip
    assert read_image(server, entry, str(good.id)).shape == (880, 1440, 3)
    assert read_image(server, entry, str(bad.id)).shape == (440, 1440, 3)


@pytest.fixture(scope="session")
def bad_files(server):
    """Files that do not fit, in the user's folders."""
    models, recipes = (server.base / "models" / f"difflens_{kind}" for kind in ("models", "recipes"))
    models.mkdir(parents=True, exist_ok=True)
    recipes.mkdir(parents=True, exist_ok=True)
    shipped = AVATARS / "difflens_recipes" / "avatars_age.safetensors"
    (recipes / "cut_off.safetensors").write_bytes(shipped.read_bytes()[:10_000])
    (recipes / "an_sae.safetensors").write_bytes((AVATARS / "difflens_saes" / "avatars.safetensors").read_bytes())
    recipe = load_recipe(shipped)
    save_recipe(recipes / "no_site.safetensors", replace(recipe, site="attic"))
    save_recipe(recipes / "height.safetensors", replace(recipe, attribute="height"))
    save_recipe(recipes / "inner_site.safetensors", replace(recipe, site="middle_block.0.qkv"))
    save_recipe(recipes / "flat_site.safetensors", replace(recipe, site="embed.0"))
    save_recipe(recipes / "small_map.safetensors", replace(recipe, levels=recipe.levels[..., :16]))
    narrow = {name: getattr(recipe, name)[..., :100] for name in ("encoder", "decoder", "probe_weight")}
    normalisation = replace(recipe.normalisation, mean=recipe.normalisation.mean[:, :100])
    save_recipe(recipes / "narrow.safetensors", replace(recipe, normalisation=normalisation, **narrow))
    foreign_sae(server, "nameless")
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    model.position.data *= 1.1
    save_denoiser(models / "other.safetensors", model, {})
    model.position.data[0, 0] = torch.nan
    save_denoiser(models / "nan.safetensors", model, {})


def bad_recipe(name: str):
    def make() -> Graph:
        graph = Small(recipe=name)
        graph.save(graph.sample(steered=True))
        return graph

    return make


def bad_settings(**settings: object):
    def make() -> Graph:
        graph = Small()
        graph.save(graph.sample(steered=True, **settings))
        return graph

    return make


def nameless_sae() -> Graph:
    graph = Small()
    graph.add("PreviewAny", source=graph.add("DiffLensLoadSAE", sae_name="nameless", site="")[1])
    return graph


def bad_size() -> Graph:
    graph = Small(size=128)
    graph.save(graph.sample())
    return graph


def bad_weights() -> Graph:
    graph = Small(model="nan")
    graph.save(graph.sample())
    return graph


def bad_report(**settings: str):
    def make() -> Graph:
        graph = Small()
        graph.report(graph.pictures(graph.sample()), **settings)
        return graph

    return make


def unequal_report() -> Graph:
    graph = Small()
    before = graph.pictures(graph.sample())
    after = graph.add("ImageFromBatch", image=before[0], batch_index=0, length=1)
    graph.report(before, after)
    return graph


def bad_capture(**settings: object):
    def make() -> Graph:
        graph = Small()
        captured = graph.capture(**settings)
        graph.add("PreviewImage", images=captured[1])
        return graph

    return make


def one_picture() -> Graph:
    graph = Small()
    graph.add("PreviewAny", source=graph.train(graph.capture(pictures=1), 10)[2])
    return graph


def another_model() -> Graph:
    graph = Small(pictures=64, model="other")
    captured = graph.capture(pictures=64, steps=2)
    sae = graph.add("DiffLensLoadSAE", sae_name="avatars.safetensors")
    labels = graph.add(
        "DiffLensClassify", images=captured[1], classifier=graph.classifier()[0], attribute="presentation"
    )
    probes = graph.add("DiffLensTrainProbes", activations=captured[0], sae=sae[0], labels=labels[0])
    avatars = graph.add("DiffLensLoadModel", model_name="avatars.safetensors")
    found = graph.add(
        "DiffLensAttribute", model=avatars[0], activations=captured[0], sae=sae[0], probes=probes[0],
        labels=labels[0], method="contrastive", features_per_class=5,
    )  # fmt: skip
    graph.add("PreviewAny", source=found[2])
    return graph


def bad_diagnosis(attribute: str, **settings: object):
    def make() -> Graph:
        graph = Small(pictures=32, recipe="avatars_presentation")
        captured = captured_and_labelled(graph, attribute, **settings)
        graph.add("PreviewAny", source=diagnose(graph, **captured)[0])
        return graph

    return make


def diagnosis_of_another_attribute() -> Graph:
    graph = Small(recipe="height")
    graph.add("PreviewAny", source=diagnose(graph)[0])
    return graph


def bad_save(name: str):
    def make() -> Graph:
        graph = Small()
        recipe = graph.add("DiffLensLoadRecipe", recipe_name=graph.recipe_name)
        graph.add("DiffLensSaveRecipe", recipe=recipe[0], name=name)
        return graph

    return make


BAD = {
    "a file cut off": (bad_recipe("cut_off"), ("Load Recipe: cut_off.safetensors", "copy or download it again")),
    "a file of another kind": (bad_recipe("an_sae"), ("Load Recipe: an_sae.safetensors", "expected a DiffLens recipe")),
    "no such site": (bad_recipe("no_site"), ("Steer: ", "no module attic")),
    "another width": (bad_recipe("narrow"), ("Steer: ", "100", "256")),
    "another width inside": (bad_recipe("inner_site"), ("Steer: ", "768", "256")),
    "no map at the site": (bad_recipe("flat_site"), ("Steer: ", "2 dimensions", "batch x channels")),
    "another map": (bad_recipe("small_map"), ("Steer: ", "64 positions", "made on 16")),
    "an unknown class": (bad_settings(target="old"), ("Steer: ", '"old" is not understood', "young, adult, senior")),
    "an empty span": (bad_settings(start_percent=0.8, end_percent=0.2), ("Steer: ", "0.8", "0.2")),
    "another picture size": (bad_size, ("64 x 64", "128")),
    "NaN in the weights": (bad_weights, ("Load Unconditional Model: nan.safetensors", "NaN")),
    "a capture of no step": (
        bad_capture(start_percent=0.7, end_percent=0.9),
        ("Capture Activations: ", "no step lies between 0.7 and 0.9"),
    ),
    "a capture of one site twice": (
        bad_capture(site="middle_block, middle_block"),
        ("Capture Activations: ", "each only once"),
    ),
    "an unknown attribute": (bad_report(attribute="height"), ("Fairness Report: ", "'height'", "presentation, age")),
    "an unknown target": (bad_report(target="1, 2"), ("Fairness Report: ", '"1, 2" is not understood')),
    "unequal batches": (unequal_report, ("Fairness Report: ", "2 pictures", "1 pictures")),
    "an SAE of an unknown site": (nameless_sae, ("Load SAE: nameless does not say", "into site", "8 latents")),
    "a capture without site": (bad_capture(site="cellar"), ("Capture Activations: ", "no module cellar")),
    "activations of another model": (another_model, ("Attribute Features: ", "captured on another model")),
    "a diagnosis of an unknown attribute": (
        diagnosis_of_another_attribute,
        ("Diagnose: ", "knows no attribute 'height'", "presentation, age"),
    ),
    "labels of another attribute": (
        bad_diagnosis("age"),
        ("Diagnose: ", "the labels are of age (young, adult, senior)", "the recipe is for presentation"),
    ),
    "activations of another site": (
        bad_diagnosis("presentation", site="up"),
        ("Diagnose: ", "the activations are of up", "edits middle_block", "Capture at the recipe's site"),
    ),
    "too little to train on": (one_picture, ("Train SAE: ", "got one picture, expected at least 2")),
    "a way out of the folder": (bad_save("../../escaped"), ("Save Recipe: ", "cannot be a file name")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_sentence(server, bad_files, case):
    make, phrases = BAD[case]
    with pytest.raises(HostError) as caught:
        server.run(to_api(make()))
    message = str(caught.value)
    assert "DiffLensError: " in message and all(phrase in message for phrase in phrases), message
    assert "\n" not in message and "Traceback" not in message


def test_the_model_is_unharmed_after_a_failed_run(server, bad_files):
    """Runs after the failures above, and after one more in the middle of sampling."""
    good = Small()
    saved = good.save(good.sample(seed=11))
    first = latents(server, server.run(to_api(good)), saved)
    with pytest.raises(HostError):
        server.run(to_api(bad_recipe("small_map")()))
    server.request("/free", json.dumps({"free_memory": True}).encode())  # forget cached results, keep the model
    assert torch.equal(first, latents(server, server.run(to_api(good)), saved))


def cancel_in(server: Server, graph: Graph, node: Node) -> None:
    """Queue the graph and cancel it once `node` reports progress."""
    running = threading.Event()

    def watch(nodes: dict) -> None:
        state = nodes.get(str(node.id))
        if state and state["state"] == "running" and 2 <= state["value"] < state["max"]:
            running.set()

    prompt_id = server.queue(to_api(graph))
    canceller = threading.Thread(target=lambda: running.wait(120) and server.interrupt(prompt_id))
    canceller.start()
    with pytest.raises(HostError, match=f"interrupted in {node.type}"):
        server.wait(prompt_id, timeout=180, on_progress=watch)
    canceller.join()


def stored(server: Server, name: str) -> dict[str, bytes]:
    """The files of a store in the user's folder."""
    folder = server.base / "models" / "difflens_activations" / name
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_cancelled_capture_goes_on_to_the_store_of_an_uninterrupted_one(server):
    def graph(name: str, **settings: object) -> tuple[Graph, Node]:
        graph = Small(pictures=4)
        inputs = {"pictures": 150, "steps": 6, "seed": 8, "site": "middle_block, up", "save_as": name}
        captured = graph.capture(**{**inputs, **settings})
        graph.add("PreviewImage", images=captured[1])
        return graph, captured

    cancel_in(server, *graph("cut"))
    begun = stored(server, "cut")
    assert 0 < len(begun) < 39, "38 shards and the index"
    server.run(to_api(graph("cut")[0]))
    server.run(to_api(graph("whole")[0]))
    cut, whole = stored(server, "cut"), stored(server, "whole")
    assert cut == whole and len(whole) == 39 and all(cut[name] == content for name, content in begun.items())
    with pytest.raises(HostError, match="Capture Activations: cut was begun with other settings: seed 8, now 9"):
        server.run(to_api(graph("cut", seed=9)[0]))


def test_a_store_holds_the_pictures_of_a_ksampler_and_is_loaded_again(server):
    graph = Small(pictures=3)
    captured = graph.capture(pictures=3, steps=4, seed=3, save_as="sub/some", start_percent=0.5)
    graph.add("PreviewImage", images=captured[1])
    plain = graph.save(graph.sample(seed=3))
    entry = server.run(to_api(graph))
    name = str(Path("sub", "some"))
    store = open_store(server.base / "models" / "difflens_activations" / name)
    assert torch.equal(store.samples(), latents(server, entry, plain))
    assert store.index.progress == (0.5, 0.75)
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    assert store.index.model == fingerprint(model.state_dict())
    expected = capture_pictures(model, 3, 3, 4, 3).activations().values[2:]
    torch.testing.assert_close(store.activations().values, expected, atol=2e-2, rtol=1e-2)

    options = server.object_info()["DiffLensLoadActivations"]["input"]["required"]["store_name"][1]["options"]
    assert {name, "whole"} <= set(options)
    graph = Small()
    loaded = graph.add("DiffLensLoadActivations", store_name=name, site="")
    saved = graph.add("SaveLatent", samples=loaded[1], filename_prefix="latents/test")
    assert torch.equal(latents(server, server.run(to_api(graph)), saved), store.samples())
    graph = Small()
    loaded = graph.add("DiffLensLoadActivations", store_name=name, site="attic")
    graph.add("SaveLatent", samples=loaded[1], filename_prefix="latents/test")
    with pytest.raises(HostError, match="Load Activations: site attic was not captured. There is: middle_block"):
        server.run(to_api(graph))


def test_training_and_attribution_take_a_store(server):
    graph = Small(pictures=32)
    captured = graph.capture(pictures=96, steps=3, save_as="labelled")
    labels = graph.add(
        "DiffLensClassify", images=captured[1], classifier=graph.classifier()[0], attribute="presentation"
    )
    sae = graph.train(captured, 30)
    probes = graph.add("DiffLensTrainProbes", activations=captured[0], sae=sae[0], labels=labels[0])
    found = graph.add(
        "DiffLensAttribute", model=graph.model[0], activations=captured[0], sae=sae[0], probes=probes[0],
        labels=labels[0], method="contrastive", features_per_class=5,
    )  # fmt: skip
    shown = graph.add("PreviewAny", source=found[2])
    (text,) = server.run(to_api(graph))["outputs"][str(shown.id)]["text"]
    assert text.startswith("presentation, by contrastive")


def test_cancel_in_the_middle_of_training_capture_a_scan_and_a_diagnosis(server):
    graph = Small()
    sae = graph.train(graph.capture(), 1_000_000, save_as="never")
    graph.add("PreviewAny", source=sae[2])
    cancel_in(server, graph, sae)
    assert not list(server.base.rglob("never*"))

    graph = Small()
    captured = graph.capture(pictures=2000, steps=20, seed=5)
    graph.add("PreviewImage", images=captured[1])
    cancel_in(server, graph, captured)

    graph = Small()
    scan = experiment(
        graph, "DiffLensSiteScan", attribute="age", sites="middle_block", pictures=2000, per_class=2, strength=1.0
    )
    cancel_in(server, graph, scan)

    graph = Small()
    cancel_in(server, graph, diagnose(graph, pictures=500))

    graph, began = Small(), time.monotonic()
    saved = graph.save(graph.sample(seed=21))
    assert latents(server, server.run(to_api(graph)), saved).std() > 0.1
    assert time.monotonic() - began < 60
