"""The Fairness Report in a real ComfyUI: its numbers and its page against the core's, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import to_api
from host import Server
from small_graphs import AVATARS, Avatars, latents, refusal, text_of

from difflens_core.classifiers import load_classifier as read_classifier
from difflens_core.measure import measure_changes, parse_confusion
from difflens_core.measure.changes import clip_similarity
from difflens_core.report import Question, report_page, share_chart, summary
from difflens_core.targets import Targets

CONFUSION = "masculine: 95 5\nfeminine: 8 92"
EVERYTHING = {
    "joint_with": "age, glasses", "confusion": CONFUSION, "undecided_below": 0.9,
    "notes": "cfg 1 <b>seed 3</b>", "save_as": "fairness/page",
}  # fmt: skip


class Reported(Avatars):
    """Four portraits without and with steering, and a report on them."""

    def __init__(self, pictures: int = 4, **settings: object):
        super().__init__(pictures)
        steered = self.steer(self.recipe("avatars_presentation"))
        drawn = [self.draw(), self.draw(steered[0])]
        self.drawn = [*map(self.save, drawn)]
        self.reported = self.report(
            *map(self.pictures, drawn), "presentation", **{"targets": steered[1], **settings}
        )  # fmt: skip
        self.shown = [self.show(self.reported[slot]) for slot in (0, 1, 3)]

    def run(self, server: Server) -> tuple[str, dict, str, list[torch.Tensor]]:
        """Text, numbers, path of the page, and the pictures before and after."""
        entry = server.run(to_api(self))
        text, numbers, page = (text_of(entry, node) for node in self.shown)
        images = [(latents(server, entry, node).movedim(1, -1) / 2 + 0.5).clamp(0, 1) for node in self.drawn]
        return text, json.loads(numbers), page, images


def close(found: object, expected: object, where: str = "") -> None:
    """Plain values are the same, numbers up to the last digits of a picture's."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            close(one, other, where)
    else:
        assert found == pytest.approx(expected, abs=2e-3) if isinstance(expected, float) else found == expected, where


def test_report_and_page_are_those_of_the_core(server: Server):
    graph = Reported(**EVERYTHING)
    text, numbers, path, images = graph.run(server)
    classifier = read_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    classes = classifier.attributes["presentation"]
    question = Question(
        "presentation", classifier.attributes, np.full(2, 0.5), parse_confusion(CONFUSION, classes), 0.9,
        ("age", "glasses"),
    )  # fmt: skip
    assigned = Targets("presentation", classes, (0.5, 0.5)).first(4)
    expected = summary(question, *(classifier.classify(side) for side in images), assigned)
    changes = measure_changes(*images)
    expected |= {
        "size": [64, 64], "notes": EVERYTHING["notes"], "changes": changes, "pixel_change": changes["rmse"],
        "not_measured": [],
    }  # fmt: skip
    close(numbers, json.loads(json.dumps(expected)))
    assert numbers["before"]["corrected"] and numbers["after"]["joint"] and numbers["after"]["undecided"]
    assert "Together: presentation and age and glasses" in text and "discrepancy, corrected" in text

    page = Path(path)
    assert page == server.output_dir / "fairness" / "page_00001_.html"
    written = page.read_text(encoding="utf-8")
    (day,) = re.findall(r"Made with DiffLens for ComfyUI. (\d{4}-\d\d-\d\d)<", written)
    shown = [(side * 255).round().to(torch.uint8).numpy() for side in images]
    assert written == report_page(numbers, share_chart(numbers), *shown, day=day)
    assert "<b>seed 3</b>" not in written and not list(page.parent.glob("*.tmp"))

    graph.reported.inputs["notes"] = "once more"
    assert Path(graph.run(server)[2]).name == "page_00002_.html" and page.read_text(encoding="utf-8") == written


def test_a_graph_of_before_these_inputs_reports_as_it_did(server: Server):
    pages = set(server.output_dir.rglob("*.html"))
    _, numbers, path, _ = Reported().run(server)
    assert path == "" and set(server.output_dir.rglob("*.html")) == pages
    assert [numbers["before"][name] for name in ("corrected", "undecided", "joint")] == [None] * 3
    assert {"n", "shares", "fd", "fd_ci", "fd_hard", "fd_hard_ci", "threshold", "success"} <= numbers["after"].keys()
    assert numbers["kept"]["age"] >= 0.5 and numbers["pixel_change"] == numbers["changes"]["rmse"] > 0.01


def test_it_reports_on_what_was_asked(server: Server):
    graph = Reported()
    graph.reported.inputs |= {"attribute": "as asked", "target": "as asked"}
    (steered,) = (node for node in graph.nodes if node.type == "DiffLensSteer")
    steered.inputs["target"] = "3, 1"
    numbers = graph.run(server)[1]
    assert numbers["attribute"] == "presentation" and numbers["target"] == pytest.approx([0.75, 0.25])


def test_without_targets_it_is_not_known_what_was_asked(server: Server):
    graph = Reported()
    graph.reported.inputs["attribute"] = "as asked"
    del graph.reported.inputs["targets"]
    assert "no targets are connected" in refusal(server, graph)


BAD = {
    "counts of another shape": ({"confusion": "9 1\n2 8\n0 0"}, ("confusion counts have 3 lines", "masculine")),
    "counts that are none": ({"confusion": "9 1\n2 x"}, ("line 2 of the confusion counts",)),
    "an unknown attribute": ({"joint_with": "age, height"}, ("'age, height' is not understood", "skin_tone")),
    "the attribute itself": ({"joint_with": "presentation"}, ("other attributes of the classifier than",)),
    "a way out of the folder": ({"save_as": "../../escaped"}, ("cannot be a file name",)),
    "a place of its own": ({"save_as": "/tmp/escaped"}, ("cannot be a file name",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_sentence(server: Server, case: str):
    settings, phrases = BAD[case]
    message = refusal(server, Reported(pictures=2, **settings))
    assert "Fairness Report: " in message and all(phrase in message for phrase in phrases), message
    assert not list(server.base.parent.rglob("escaped*"))


@torch.inference_mode()
def test_clip_vision_adds_clip_i_and_says_what_needs_more_pictures(inside):
    vision = inside.random_clip_vision(8)
    before, noise = (torch.rand(5, 40, 32, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    after = before.lerp(noise, 0.3)
    embed = inside.host.image_embedder(vision)
    told = []
    found, reasons = inside.pack_module("nodes.report").what_changed(before, after, "none", embed, told.append)
    expected = [vision.encode_image(images)["image_embeds"].float() for images in (before, after)]
    assert found["clip_i"] == pytest.approx(clip_similarity(*expected), abs=1e-4) and 0.5 < found["clip_i"] < 1
    assert [reason[:4] for reason in reasons] == ["FID ", "KID "] and told[-1] == 15
    with pytest.raises(ValueError, match="shares no space with CLIP's texts"):
        inside.host.image_embedder(inside.random_clip_vision(None))


@torch.inference_mode()
def test_a_missing_package_does_not_stop_a_report(inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    for name in [name for name in sys.modules if name.startswith("torchmetrics.")]:
        monkeypatch.delitem(sys.modules, name)
    before = torch.rand(2, 64, 64, 3)
    found, reasons = inside.pack_module("nodes.report").what_changed(before, before, "DISTS", None, lambda done: None)
    assert found["ssim"] == pytest.approx(1) and "DISTS" not in found
    assert len(reasons) == 1 and "DISTS is computed by torchmetrics" in reasons[0] and "pip install" in reasons[0]


def test_it_is_said_when_sampling_did_not_tell_which_class_each_picture_was_asked_to_show(inside):
    targets, report = inside.pack_module("difflens_core.targets"), inside.pack_module("nodes.report")
    asked = targets.Targets("age", ("young", "senior"), (0.5, 0.5))
    (sentence,) = report.untold(asked, 2)
    assert "its last runs drew other pictures than these 2" in sentence
    asked.log.numbers += [np.array([6, 1]), np.array([4])]
    assert report.untold(asked, 1) == report.untold(asked, 3) == [] and report.untold(asked, 2)
    assert asked.shown_last(3).tolist() == asked.at(np.array([6, 1, 4])).tolist()
    planned = targets.Targets("age", ("young", "senior"), (0.5, 0.5), asked=np.array([0, 1]))
    assert report.untold(planned, 2) == []
