"""A graph with pairs for people to judge, plain red and plain blue ones, so that it can be seen which is which."""

from __future__ import annotations

import csv
import io
import json
import urllib.error
from pathlib import Path

from graphs import to_api
from graphs.pieces import report_on
from host import Server
from PIL import Image
from small_graphs import Avatars, text_of

RED, BLUE = 0xC00000, 0x0000C0
NAMES = ("as it is", "steered")


class Pairs(Avatars):
    """Red pictures to be judged beside blue ones, and a report that counts it."""

    def __init__(self, pictures: int = 4, **settings: object):
        super().__init__()
        self.sides = [
            self.add("EmptyImage", width=64, height=64, batch_size=pictures, color=colour) for colour in (RED, BLUE)
        ]
        inputs = {
            "names": "\n".join(NAMES), "attribute": "skin_tone", "save_as": "judged/by_eye", "seed": 0,
            "catch_pairs": 0,
        }  # fmt: skip
        first, second = self.sides
        self.judge = self.add("DiffLensJudge", first=first[0], second=second[0], **{**inputs, **settings})
        self.reported = report_on(
            self, None, self.classifier[0], "presentation", "uniform", first[0], second[0], None, save_as=""
        )  # fmt: skip
        del self.reported.inputs["targets"]
        self.reported.inputs["judgements"] = self.judge[0]
        self.shown = [self.show(self.judge[1]), self.show(self.reported[1]), self.show(self.reported[0])]

    def run(self, server: Server) -> tuple[str, dict, str]:
        """The id by which the pairs are asked for, the report's numbers on them, and what the node tells."""
        entry = server.run(to_api(self))
        told, numbers, text = (text_of(entry, node) for node in self.shown)
        (run,) = entry["outputs"][str(self.judge.id)]["judging"]
        judged = json.loads(numbers)["judged"]
        assert ("Judged by people" in text) == bool(judged["judged"])
        return run, judged, told


def pairs(server: Server, run: str, judge: str) -> dict:
    return json.loads(server.request(f"/difflens/judging/{run}?judge={judge}"))


def hand_in(server: Server, run: str, body: object) -> tuple[int, dict]:
    """The server's status and answer to a judgement; bytes are sent as they are."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return 200, json.loads(server.request(f"/difflens/judging/{run}", body))
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def is_red(server: Server, shown: dict, pair: dict, side: str) -> bool:
    picture = server.get_image({"filename": pair[side], "subfolder": shown["folder"], "type": "temp"})
    red, _, blue = Image.open(io.BytesIO(picture)).convert("RGB").getpixel((5, 5))
    return red > blue


def rows(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
