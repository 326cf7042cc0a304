"""Classifiers in a real ComfyUI: a FairFace file through the server, CLIP models of ComfyUI's own classes."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch
from graphs import Graph, sampler, to_api
from host import HostError, Server
from safetensors.torch import save_file
from small_graphs import latents, text_of
from torch.nn import functional as F
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
    table, numbers, text, loaded_as = (text_of(entry, node) for node in shown)

    pictures = (latents(server, entry, saved).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    read = load_any_classifier(fairface)[0].classify(pictures)
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
    table, loaded_as = (text_of(entry, node) for node in shown)
    assert "input: the largest face, or the whole picture where there is none" in loaded_as
    assert [(row["age"], row["no face"]) for row in csv.DictReader(io.StringIO(table))] == [("", "1.0000")] * 2
    graph.add("DiffLensReport", classifier=classifier[0], attribute="age", target="uniform", before=picture[0])
    with pytest.raises(HostError, match="Fairness Report: no face was found in any of the 2 pictures"):
        server.run(to_api(graph))


# --- the Zero-shot Classifier, in this process, against CLIP's formula step by step ---

CLASSES = "young: a small child | somebody young\nold: an (old) person"


def zero_shot(inside, clip, vision, attribute: str = "age", classes: str = CLASSES):
    return inside.pack_module("nodes.classify").ZeroShot.execute(clip, vision, attribute, classes).args[0]


def text_by_hand(encoder, tokens: list) -> torch.Tensor:
    """CLIP's text embedding: the last layer where the text ends, times the projection."""
    ids = torch.tensor([[token for token, _ in tokens[0]]])
    last = encoder.transformer.text_model(ids)[0].float()
    end = ids[0].tolist().index(49407)
    return (last[0, end] @ encoder.transformer.text_projection.weight.float().T)[None]


def picture_by_hand(vision, images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(vision.image_mean), torch.tensor(vision.image_std)
    pooled = vision.model.vision_model(((images - mean) / std).movedim(-1, 1))[2]
    return pooled.float() @ vision.model.visual_projection.weight.float().T


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "letter", "width"), [("SD1", "l", 32), ("SDXL", "g", 48)])
def test_zero_shot_is_the_softmax_of_a_hundred_cosines(inside, kind, letter, width):
    clip, vision = inside.random_clip(kind), inside.random_clip_vision(width)
    encoder = getattr(clip.cond_stage_model, f"clip_{letter}")
    images = torch.randint(256, (5, 32, 32, 3), generator=torch.Generator().manual_seed(1)) / 255
    classifier = zero_shot(inside, clip, vision, " age ")
    found = classifier.classify(images, batch=2)["age"]
    texts = []
    for prompts in (["a small child", "somebody young"], ["an old person"]):
        rows = [text_by_hand(encoder, clip.tokenize(prompt)[letter]).double() for prompt in prompts]
        texts.append(sum(row / row.norm() for row in rows) / len(rows))
    for i, picture in enumerate(picture_by_hand(vision, images).double()):
        cosines = [float(F.cosine_similarity(picture[None], text)) for text in texts]
        expected = 1 / (1 + math.exp(100 * (cosines[1] - cosines[0])))
        assert abs(float(found[i, 0]) - expected) < 2e-3, (i, found[i], expected)
        assert abs(cosines[0] - cosines[1]) > 1e-3, cosines
    assert classifier.attributes == {"age": ("young", "old")} and found.shape == (5, 2)
    assert clip.cond_stage_model.clip_l.execution_device is None, "the CLIP's options are as they were"
    torch.testing.assert_close(classifier.classify(images, batch=5)["age"], found, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_what_comfyui_gives_by_itself_for_sd1_has_not_been_projected(inside):
    """Why Zero-shot Classifier sets an option of the CLIP."""
    clip = inside.random_clip("SD1")
    tokens = clip.tokenize("an old person")
    pooled = clip.encode_from_tokens(tokens, return_pooled=True)[1]
    assert (pooled - text_by_hand(clip.cond_stage_model.clip_l, tokens["l"])).abs().max() > 0.1


NO_PAIRS = {
    "halves of two CLIPs": ("SD1", 48, CLASSES, ("32 numbers", "vision model's 48", "CLIP-ViT-bigG-14 (1280)")),
    "pictures without texts": ("SD1", None, CLASSES, ("clip_vision_model", "shares no space", "Pairs that fit")),
    "texts without pictures": ("T5", 32, CLASSES, ("is no CLIP", "Pairs that fit")),
    "one class": ("SD1", 32, "young: a child", ("got 1 classes",)),
}


@torch.inference_mode()
@pytest.mark.parametrize("case", NO_PAIRS)
def test_what_makes_no_zero_shot_classifier_is_refused(inside, case):
    kind, width, classes, phrases = NO_PAIRS[case]
    with pytest.raises(inside.DiffLensError, match="^Zero-shot Classifier: ") as caught:
        zero_shot(inside, inside.random_clip(kind), inside.random_clip_vision(width), classes=classes)
    assert all(phrase in str(caught.value) for phrase in phrases), caught.value


@torch.inference_mode()
def test_a_checkpoint_without_clips_text_projection_is_refused(inside, tmp_path):
    clip, vision, path = inside.random_clip("SD1"), inside.random_clip_vision(32), tmp_path / "v1-5.safetensors"
    clip.patcher.cached_patcher_init = (None, (str(path),))
    save_file({"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(2)}, path)
    with pytest.raises(inside.DiffLensError, match="v1-5.safetensors, which lacks CLIP's text projection.* Load CLIP"):
        zero_shot(inside, clip, vision)
    save_file({"text_projection.weight": torch.ones(2)}, path)
    assert zero_shot(inside, clip, vision).attributes == {"age": ("young", "old")}
