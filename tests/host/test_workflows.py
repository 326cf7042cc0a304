"""The shipped workflows run and keep what they promise. Each is run once, for all its tests.

Two take long. They are run small to see that they work, and as they are under the mark `slow`, where their figures
must come out.
"""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from expected import shipped
from host import HostError
from PIL import Image
from small_graphs import NAMES, api_file, find, image_of, text_of

from difflens_core.steer import load_recipe

LONG = (NAMES[2], NAMES[9])


def runs(*names: str) -> list:
    """Runs of these workflows: name, and whether whole. All are whole; the long ones small, too."""
    small = [pytest.param(name, False, id=f"{name}, small") for name in names if name in LONG]
    return small + [pytest.param(name, True, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name in names]


# The most that a small run does; a classifier must see both classes among what is captured.
FEW = {
    "EmptyLatentImage": {"batch_size": 8},
    "KSampler": {"steps": 4},
    "DiffLensCapture": {"pictures": 64, "steps": 6, "per_class": 4},
    "DiffLensCalibrate": {"budget": 80, "steps": 4},
    "DiffLensTrainSAE": {"steps": 40, "batch_size": 256},
    "DiffLensRankByEffect": {"pictures": 2, "steps": 3},
}


def smaller(prompt: dict) -> dict:
    for node in prompt.values():
        for name, most in FEW.get(node["class_type"], {}).items():
            node["inputs"][name] = min(node["inputs"][name], most)
    return prompt


@pytest.fixture(scope="module")
def ran(server):
    """Function that runs a shipped workflow, once: (prompt, history entry)."""
    done = {}

    def run(name: str, whole: bool = True) -> tuple[dict, dict]:
        if (name, whole) not in done:
            prompt = api_file(name) if whole else smaller(api_file(name))
            done[name, whole] = prompt, server.run(prompt, timeout=1200)
        return done[name, whole]

    return run


def read_report(prompt: dict, entry: dict) -> dict:
    return numbers_of(entry, find(prompt, "DiffLensReport"))


def numbers_of(entry: dict, report: str) -> dict:
    """What a Fairness Report of that id left in the prompt's history for programs."""
    (numbers,) = entry["outputs"][report]["json"]
    return json.loads(numbers)


def batches(prompt: dict) -> set[int]:
    """How many pictures the samplers draw at once."""
    samplers = [node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler"]
    return {prompt[inputs["latent_image"][0]]["inputs"]["batch_size"] for inputs in samplers}


@pytest.mark.parametrize(("name", "whole"), runs(*(NAMES[i] for i in (1, 2, 3, 7, 9))))
def test_a_workflow_makes_its_pictures(server, ran, name, whole):
    prompt, entry = ran(name, whole)
    compare = find(prompt, "DiffLensCompare")
    grid = image_of(server, entry, find(prompt, "SaveImage", images=[compare, 0]))
    report, inputs = read_report(prompt, entry), prompt[compare]["inputs"]
    columns = min(inputs["columns"], report["n"])
    lines = sum(key.startswith("rows.") for key in inputs) * math.ceil(report["n"] / columns)
    assert grid.shape[1] == columns * 134 + 6 and grid.shape[0] > lines * 134
    chart = image_of(server, entry, find(prompt, "SaveImage", images=[find(prompt, "DiffLensReport"), 2]))
    assert chart.shape == (440, 720, 3)
    for node_id, output in entry["outputs"].items():
        for reference in output.get("images", ()):
            picture = np.asarray(Image.open(io.BytesIO(server.get_image(reference))).convert("RGB"))
            assert picture.std() > 10, f"node {node_id} made an empty picture"
    assert {report["n"]} == batches(prompt) and sum(report["before"]["shares"]) == pytest.approx(1)


def test_the_workflows_for_files_that_are_not_shipped_name_what_is_missing(server):
    for name, missing in ((NAMES[5], "celebahq_p2.pt"), (NAMES[6], "v1-5-pruned"), (NAMES[11], "v1-5-pruned")):
        with pytest.raises(HostError, match=missing):
            server.run(api_file(name))


def test_the_way_to_a_recipe_for_ones_own_model_is_that_of_any(server):
    """The workflow for a checkpoint of one's own, with the avatars at work and their classifier in its place."""
    prompt, own = smaller(api_file(NAMES[11])), "prompted_avatars.safetensors"
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {
                "class_type": "DiffLensLoadPromptedModel",
                "inputs": {"model_name": "prompted_avatars.safetensors"},
            }
        elif node["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 64, "height": 64}
        elif node["class_type"] == "DiffLensLoadClassifier":
            inputs |= {"classifier_name": own, "face_detector": "none"}
        elif inputs.get("text"):
            inputs["text"] = "portrait of a person"
        elif node["class_type"] == "DiffLensTrainSAE":
            inputs["latents"] = 256
        inputs |= {"attribute": "presentation"} if "attribute" in inputs else {}
        inputs |= {"cfg": 2.0} if "cfg" in inputs else {}
    entry = server.run(prompt, timeout=1200)
    report = read_report(prompt, entry)
    assert report["n"] == 4 and report["after"]["success"] is not None
    saved = server.base / "models" / "difflens_recipes" / "my_model_gender.safetensors"
    assert load_recipe(saved).site == "middle_block" and "calibration" in load_recipe(saved).info


def test_debiasing_brings_the_mix_to_the_target(ran):
    report = read_report(*ran(NAMES[1]))
    assert report["before"]["fd"] > 0.2 and report["after"]["fd"] < 0.5 * report["before"]["fd"]
    assert report["after"]["success"] >= 0.85
    assert report["kept"]["background"] >= 0.8 and report["kept"]["clothes"] >= 0.8


@pytest.mark.parametrize(("name", "whole"), runs(NAMES[2]))
def test_features_found_from_scratch_make_a_recipe(server, ran, name, whole):
    prompt, entry = ran(name, whole)
    quality = text_of(entry, find(prompt, "PreviewAny", source=[find(prompt, "DiffLensTrainSAE"), 2]))
    assert 0 < float(quality.split("FVU ")[1].split(",")[0]) < (0.5 if whole else 1)
    recipes = server.object_info()["DiffLensLoadRecipe"]["input"]["required"]["recipe_name"][1]["options"]
    assert "my_presentation.safetensors" in recipes
    if whole:
        report = read_report(prompt, entry)
        assert report["after"]["fd"] < 0.1 < 0.3 < report["before"]["fd"] and report["after"]["success"] >= 0.95


def test_the_dose_counts(ran):
    report = read_report(*ran(NAMES[3]))
    assert report["after"]["success"] >= 0.85 > 0.5 > report["before"]["shares"][2]


def test_one_recipe_debiases_every_prompt(server, ran):
    prompt, entry = ran(NAMES[4])
    titles = {node.get("_meta", {}).get("title"): node_id for node_id, node in prompt.items()}
    for job in ("Doctor", "Nurse", "Firefighter", "Receptionist"):
        report = numbers_of(entry, titles[f"{job}, measured"])
        assert report["n"] == 16 and report["before"]["fd"] > 0.3 > 0.1 > report["after"]["fd"], job
        assert report["after"]["success"] >= 0.9 and report["kept"]["occupation"] >= 0.9, job
    grid = image_of(server, entry, find(prompt, "SaveImage", images=[find(prompt, "DiffLensCompare"), 0]))
    assert grid.shape[1] == 16 * 134 + 6 and grid.std() > 10


def test_three_attributes_are_balanced_at_once_by_the_fewest_changes(ran):
    prompt, entry = ran(NAMES[7])
    report = read_report(prompt, entry)
    joint = report["after"]["joint"]
    assert len(joint["cells"]) == 24 and joint["fd_hard"] < 0.06 < 0.3 < report["before"]["joint"]["fd_hard"]
    assert report["after"]["success"] >= 0.9 and max(joint["counts"]) <= 4
    moved = int(text_of(entry, find(prompt, "PreviewAny", source=[find(prompt, "DiffLensPlan"), 1])).split()[0])
    before = np.array(report["before"]["joint"]["counts"])
    assert moved == np.abs(before - 2).sum() / 2, "the total variation distance, in pictures"
    assert report["n"] == 48 and report["changes"]["changed"] == pytest.approx(moved / 48), (
        "the others stay as they are"
    )
    matrix = text_of(entry, find(prompt, "PreviewAny", source=[find(prompt, "DiffLensCrossEffects"), 0]))
    rows = {line.split("  ")[0]: line for line in matrix.splitlines()[2:]}
    assert rows.keys() == {"presentation", "age", "skin_tone", "all together"}


def test_the_scan_tells_where_it_is_decided(server, ran):
    prompt, entry = ran(NAMES[8])
    scan = find(prompt, "DiffLensSiteScan")
    table = text_of(entry, find(prompt, "PreviewAny", source=[scan, 0]))
    rows = [line.split() for line in table.splitlines()[2:] if " + " not in line]
    success = {(row[0], row[1]): float(row[2]) for row in rows if row[1] in ("whole", "reversed")}
    assert len(rows) == 5 * 5 and success["middle_block", "whole"] >= 40 >= 15 >= success["middle_block", "reversed"]
    chart = image_of(server, entry, find(prompt, "SaveImage", images=[scan, 2]))
    assert chart.shape == (440, 720, 3) and chart.std() > 10


@pytest.mark.parametrize(("name", "whole"), runs(NAMES[9]))
def test_few_features_that_count_steer(ran, name, whole):
    prompt, entry = ran(name, whole)
    table = text_of(entry, find(prompt, "PreviewAny", source=[find(prompt, "DiffLensRankByEffect"), 2]))
    assert len(table.splitlines()) == 2 + len(shipped("presentation").features)
    if whole:
        report = read_report(prompt, entry)
        assert report["after"]["success"] >= 0.85 > report["before"]["shares"][1]


def test_the_diagnosis_calls_out_the_control_alone(server, ran):
    prompt, entry = ran(NAMES[10])
    for recipe, verdict in (("avatars_presentation", "Nothing wrong found."), ("random", "Wrong features: ")):
        (loaded,) = [i for i, n in prompt.items() if recipe in n["inputs"].get("recipe_name", "")]
        node = find(prompt, "DiffLensDiagnose", recipe=[loaded, 0])
        text = text_of(entry, find(prompt, "PreviewAny", source=[node, 0]))
        assert text.startswith(f"presentation: {verdict}"), text
        assert image_of(server, entry, find(prompt, "SaveImage", images=[node, 2])).std() > 10
