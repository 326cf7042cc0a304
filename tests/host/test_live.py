"""What nodes show in the page while they work: charts that grow, and both pictures of a run that is drawn twice."""

from __future__ import annotations

import importlib
import io
import json
import time

import numpy as np
import pytest
import torch
from graphs import to_api
from host import Server
from PIL import Image
from small_graphs import Avatars, diagnose
from websocket import BINARY, WebSocket

PREVIEW = 4  # kind of binary message that holds a picture of a node and what it is of
CHART = (720, 440)


def shown(server: Server, graph: Avatars, node: str) -> list[np.ndarray]:
    """Run the graph as a page does, and return the pictures that the server sends of a node meanwhile."""
    pictures, deadline = [], time.monotonic() + 600
    with WebSocket("127.0.0.1", server.port, "/ws?clientId=live", timeout=60) as page:
        page.say(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        body = {"prompt": to_api(graph), "client_id": "live"}
        prompt = json.loads(server.request("/prompt", json.dumps(body).encode()))["prompt_id"]
        while time.monotonic() < deadline:
            for kind, message in page.frames(1):
                if kind == BINARY and int.from_bytes(message[:4], "big") == PREVIEW:
                    size = int.from_bytes(message[4:8], "big")
                    if json.loads(message[8 : 8 + size])["node_id"] == node:
                        picture = Image.open(io.BytesIO(message[8 + size :])).convert("RGB")
                        pictures.append(np.asarray(picture))
            if prompt in json.loads(server.request(f"/history/{prompt}")):
                server.wait(prompt)
                return pictures
    raise AssertionError(f"not done, after {len(pictures)} pictures")


def calibrate(graph: Avatars):
    return graph.experiment(
        "DiffLensCalibrate", recipe=graph.recipe("avatars_presentation"), target="uniform", budget=80, tolerance=0.02,
        clear=0.99, only_where_needed=False, spare_others=False,
    )  # fmt: skip


LONG = {
    "Site Scan": lambda graph: graph.experiment(
        "DiffLensSiteScan", attribute="age", sites="encoder\nmiddle_block", pictures=48, per_class=4,
        strength=1.0,
    ),
    "Rank by Effect": lambda graph: graph.experiment(
        "DiffLensRankByEffect", recipe=graph.recipe("avatars_presentation"), change="amplify", strength=10.0,
        pictures=2, features_per_class=5, steps=1,
    ),
    "Cross Effects": lambda graph: graph.experiment(
        "DiffLensCrossEffects", **{"recipes.recipe0": graph.recipe("avatars_presentation"),
                                   "recipes.recipe1": graph.recipe("avatars_age")}, pictures=16,
    ),
    "Diagnose": lambda graph: diagnose(graph, "avatars_presentation"),
    "Calibrate": calibrate,
    "Capture": lambda graph: graph.capture(
        pictures=16, classifier=graph.classifier[0], attribute="age", per_class=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_a_long_node_shows_a_chart_of_what_it_found_so_far(server: Server, name: str):
    graph = Avatars(pictures=8)
    node = LONG[name](graph)
    for slot in range(2):
        graph.show(node[slot])
    charts = [picture for picture in shown(server, graph, str(node.id)) if picture.shape[1::-1] == CHART]
    assert charts and all(chart.std() > 10 for chart in charts)
    assert len(charts) < 2 or any((one != other).any() for one, other in zip(charts, charts[1:], strict=False))


def test_charts_are_not_drawn_faster_than_anybody_can_see(inside):
    view, drawn = inside.host.LiveView(), []

    def draw(number: int) -> np.ndarray:
        drawn.append(number)
        return np.zeros((4, 6, 3), dtype=np.uint8)

    for number in range(1000):
        view(number, 1000)
        view.chart(draw, number)
    assert drawn[0] == 0 and len(drawn) <= 5


@torch.inference_mode()
@pytest.mark.parametrize("previews", [True, False])
def test_a_run_that_is_drawn_twice_shows_both_pictures_under_one_bar(inside, monkeypatch, previews: bool):
    comfy, told, sent = inside.comfy, [], []
    latent_preview = importlib.import_module("latent_preview")
    methods = latent_preview.LatentPreviewMethod
    monkeypatch.setattr(latent_preview.args, "preview_method", methods.Latent2RGB if previews else methods.NoPreviews)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *bar, **_: sent.append(bar[:3]))

    class Push:
        site = "mid_block"

        def __call__(self, h, progress, images, shown=None):
            return h + 3

        def acts(self, progress):
            return True

    model = inside.model("U-Net")
    held = inside.host.apply_site(model, "mid_block", Push(), "Steer", hold=True)
    latent, steps = inside.latent("U-Net"), 3
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    positive = inside.prompt("U-Net", 1)
    comfy.sample.sample(
        held, noise, steps, 1.0, "euler", "normal", positive, positive, latent["samples"], disable_pbar=True, seed=0,
        callback=lambda step, x0, x, total: told.append((step, total, x0)),
    )  # fmt: skip
    inside.forget()
    assert [(step, total) for step, total, _ in told] == [(step, 2 * steps) for step in range(2 * steps)]
    pictures = [picture for _, _, picture in sent if picture]
    assert len(pictures) == (steps if previews else 0)
    for step, (_, image, _) in enumerate(pictures):
        both = np.asarray(image).astype(int)
        plain, steered = np.split(both, 2, axis=1)
        assert both.shape[1] == 2 * latent["samples"].shape[-1] and (plain != steered).any()
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        for half, x0 in ((plain, told[step][2]), (steered, told[steps + step][2])):
            alone = np.asarray(previewer.decode_latent_to_preview(x0)).astype(int)
            assert abs(half - alone).max() <= 1
