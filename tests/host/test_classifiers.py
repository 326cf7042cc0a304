"""Classifiers in a real ComfyUI: a FairFace file through the server, CLIP models of ComfyUI's own classes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from environment import ensure_comfyui, ensure_environment
from graphs import Graph, sampler, to_api
from host import HostError, Server
from safetensors.torch import load_file
from torchvision.models import resnet

from difflens_core.classifiers import load_any_classifier
from difflens_core.classifiers.readings import left_out

NAME = "res34_fair_align_multi_7.pt"


@pytest.fixture(scope="module")
def fairface(server: Server) -> Path:
    """A file in FairFace's layout with random weights in the user's folder, beside one that is no classifier."""
    folder = server.base / "models" / "difflens_classifiers"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = resnet.resnet34(num_classes=18)
    torch.nn.init.normal_(network.fc.weight, 0, 0.3)
    torch.save(network.state_dict(), folder / NAME)
    torch.save({"unet.weight": torch.ones(2)}, folder / "unet.pth")
    return folder / NAME


def loaded(name: str) -> tuple[Graph, object]:
    graph = Graph("classifiers")
    graph.group("all")
    return graph, graph.add("DiffLensLoadClassifier", classifier_name=name, face_detector="none")


def test_fairface_classifies_and_reports(server: Server, fairface: Path):
    graph, classifier = loaded(NAME)
    model = graph.add("DiffLensLoadModel", model_name="avatars.safetensors")
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=3)
    drawn = sampler(graph, None, model[0], model[1], latent, 5)
    drawn.inputs["steps"] = 3
    pictures = graph.add("VAEDecode", samples=drawn[0], vae=model[2])
    saved = graph.add("SaveLatent", samples=drawn[0], filename_prefix="latents/faces")
    labels = graph.add("DiffLensClassify", images=pictures[0], classifier=classifier[0], attribute="race")
    report = graph.add(
        "DiffLensReport", classifier=classifier[0], attribute="race", target="uniform", before=pictures[0],
        after=pictures[0],
    )  # fmt: skip
    shown = [graph.add("PreviewAny", source=link) for link in (labels[1], report[1], report[0], classifier[1])]
    entry = server.run(to_api(graph), timeout=600)
    table, numbers, text, loaded_as = (entry["outputs"][str(node.id)]["text"][0] for node in shown)

    (reference,) = entry["outputs"][str(saved.id)]["latents"]
    latents = load_file(server.output_dir / reference["subfolder"] / reference["filename"])["latent_tensor"]
    read = load_any_classifier(fairface)[0].classify((latents.movedim(1, -1) / 2 + 0.5).clamp(0, 1))
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == 3 and list(rows[0])[-2:] == ["gender", "age"]
    for i, row in enumerate(rows):
        found = [float(row[f"p({name})"]) for name in ("white", "black", "asian", "indian")]
        assert found == pytest.approx(read["race"][i].tolist(), abs=2e-3)
        assert float(row["race: other classes"]) == pytest.approx(float(read[left_out("race")][i]), abs=2e-3)

    numbers = json.loads(numbers)
    assert numbers["before"]["labels"] == numbers["after"]["labels"] == [row["race"] for row in rows]
    assert numbers["before"]["n"] == 3 and numbers["kept"] == {"gender": 1.0, "age": 1.0}
    left = float(read[left_out("race")].mean())
    assert numbers["before"]["left_out"] == {"other classes": pytest.approx(left, abs=2e-3)}
    mean = read["race"].mean(dim=0)
    assert numbers["before"]["fd"] == pytest.approx(float((mean - 0.25).norm()), abs=2e-3)
    assert "left out, other classes" in text
    assert loaded_as.startswith("format: FairFace, ResNet-34\n") and "race: white, black, asian, indian" in loaded_as


def test_a_file_that_is_no_classifier_is_refused(server: Server, fairface: Path):
    options = server.object_info()["DiffLensLoadClassifier"]["input"]["required"]["classifier_name"][1]["options"]
    assert {NAME, "unet.pth", "avatars.safetensors"} <= set(options)
    graph, classifier = loaded("unet.pth")
    graph.add("PreviewAny", source=classifier[1])
    with pytest.raises(HostError, match="Load Attribute Classifier: unet.pth: not a classifier of a known format"):
        server.run(to_api(graph))


def test_zero_shot_on_comfyuis_own_clip():
    script = Path(__file__).with_name("clip_in_comfyui.py")
    command = [str(ensure_environment()), str(script), str(ensure_comfyui())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.splitlines()[-3:] == ["SD1 ok", "SDXL ok", "refusals ok"]


def test_pictures_without_a_face_are_told_apart(server: Server, fairface: Path):
    detection = pytest.importorskip("kornia.contrib.face_detection")
    blind = {name: torch.zeros_like(t) for name, t in detection.YuNet("train", pretrained=False).state_dict().items()}
    torch.save(blind, fairface.with_name("blind.pth"))
    graph, classifier = loaded(NAME)
    classifier.inputs["face_detector"] = "blind.pth"
    picture = graph.add("EmptyImage", width=64, height=48, batch_size=2, color=0x804020)
    labels = graph.add("DiffLensClassify", images=picture[0], classifier=classifier[0], attribute="age")
    shown = [graph.add("PreviewAny", source=link) for link in (labels[1], classifier[1])]
    entry = server.run(to_api(graph))
    table, loaded_as = (entry["outputs"][str(node.id)]["text"][0] for node in shown)
    assert "input: the largest face, or the whole picture where there is none" in loaded_as
    assert [(row["age"], row["no face"]) for row in csv.DictReader(io.StringIO(table))] == [("", "1.0000")] * 2
    graph.add("DiffLensReport", classifier=classifier[0], attribute="age", target="uniform", before=picture[0])
    with pytest.raises(HostError, match="Fairness Report: no face was found in any of the 2 pictures"):
        server.run(to_api(graph))
