"""What the page shows people to judge, and the way of their judgements into a file.

A run of the node puts its pictures into ComfyUI's temp folder, under names that tell nothing, and gets an id. By that
alone the page asks for the pairs, in the order for a judge, and hands in what was said. Which picture is which never
leaves this process.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from aiohttp import web
from PIL import Image
from server import PromptServer

from ...difflens_core.files import DiffLensError
from ...difflens_core.measure import (
    FIRST,
    NEITHER,
    SECOND,
    Judged,
    Judgement,
    add_judgement,
    check_changed,
    check_name,
    kinds_shown,
    last_said,
    order_for,
    read_judgements,
)
from .files import name_parts, temporary_file
from .progress import node_id, show

ROUTE = "/difflens/judging/{run}"
LARGEST_BODY = 4096  # bytes of a judgement as the page sends it
KEPT = 64  # runs whose pairs can still be judged
LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class Judging:
    """A run of the node whose pairs the page may show. pictures: a file below `folder` for each pair and side."""

    judged: Judged
    path: Path
    seed: int
    folder: str
    pictures: list[dict[str, str]]
    node: str | None


RUNS: dict[str, Judging] = {}
WRITING = threading.Lock()  # one judgement at a time


def judgement_file(name: str) -> Path:
    """The CSV file of that name in ComfyUI's output folder, which may not be there yet."""
    *folders, last = name_parts(name.strip().removesuffix(".csv"))
    return Path(folder_paths.get_output_directory(), *folders, f"{last}.csv")


def begin_judging(
    judged: Judged, first: np.ndarray, second: np.ndarray, path: Path, seed: int, report: Callable[[int], None]
) -> str:
    """Put pictures (n x H x W x 3, uint8, each) where the page finds them. Returns the id by which it asks."""
    run = secrets.token_hex(16)
    folder = temporary_file(f"difflens_judging_{run}")
    folder.mkdir()
    pictures = []
    for number, pair in enumerate(zip(first, second, strict=True)):
        names = {side: f"{secrets.token_hex(8)}.png" for side in (FIRST, SECOND)}
        for name, picture in zip(names.values(), pair, strict=True):
            Image.fromarray(picture).save(folder / name, compress_level=1)
        pictures.append(names)
        report(number + 1)
    RUNS[run] = Judging(judged, path, seed, folder.name, pictures, node_id())
    while len(RUNS) > KEPT:
        RUNS.pop(next(iter(RUNS)))
    return run


def sides_of(first_left: bool) -> dict[str, str]:
    """Which pictures are on which side."""
    return {LEFT: FIRST, RIGHT: SECOND} if first_left else {LEFT: SECOND, RIGHT: FIRST}


def pairs_for(run: Judging, judge: str) -> dict[str, Any]:
    """The pairs in the order for a judge, with what that judge said before."""
    said = {
        one.pictures: one for one in last_said(read_judgements(run.path), run.judged.pairs) if one.judge == judge
    }  # fmt: skip
    pairs = []
    for number, first_left in order_for(judge, len(run.pictures), run.seed):
        sides = sides_of(first_left)
        pair: dict[str, Any] = {side: run.pictures[number][which] for side, which in sides.items()}
        if one := said.get(run.judged.pairs[number].mark):
            better = next((side for side, which in sides.items() if which == one.better), NEITHER)
            pair["said"] = {"better": better, "changed": one.changed}
        pairs.append(pair)
    return {
        "judge": judge, "folder": run.folder, "pairs": pairs,
        "kinds": list(kinds_shown(run.judged.attribute).items()),
    }  # fmt: skip


def judgement_from(run: Judging, said: Any) -> Judgement:
    """What the page sent as a judgement. Raises `DiffLensError` or ValueError that says what is wrong with it."""
    if not isinstance(said, dict) or said.keys() != {"judge", "pair", "better", "changed"}:
        raise DiffLensError("a judgement has judge, pair, better and changed, and nothing else.")
    judge, place, better, changed = said["judge"], said["pair"], said["better"], said["changed"]
    if not isinstance(judge, str) or not isinstance(changed, list) or not all(isinstance(c, str) for c in changed):
        raise DiffLensError("judge is a text and changed a list of texts.")
    judge = check_name(judge, "the judge's name")
    if type(place) is not int or not 0 <= place < len(run.pictures):
        raise DiffLensError(f"pair is a number from 0 to {len(run.pictures) - 1}.")
    number, first_left = order_for(judge, len(run.pictures), run.seed)[place]
    choices = sides_of(first_left) | {NEITHER: NEITHER}
    if not isinstance(better, str) or better not in choices:
        raise DiffLensError(f"better is one of {', '.join(choices)}.")
    if "attribute" in changed and not run.judged.attribute:
        raise DiffLensError("no attribute was named, so none can be said to have changed.")
    pair, names = run.judged.pairs[number], run.judged.names
    return Judgement(
        datetime.now(timezone.utc).isoformat(timespec="seconds"), judge, pair.mark, pair.number, pair.equal, *names,
        choices[LEFT], choices[better], check_changed(changed),
    )  # fmt: skip


def hand_in(run: Judging, said: Any) -> int:
    """Write down a judgement, and return how many pairs its judge has judged."""
    judgement = judgement_from(run, said)
    with WRITING:
        add_judgement(run.path, judgement)
    own = [one for one in last_said(read_judgements(run.path), run.judged.pairs) if one.judge == judgement.judge]
    if run.node is not None:
        show(run.node, f"{judgement.judge}: {len(own)} of {len(run.pictures)} pairs judged. Run again to count them.")
    return len(own)


# --- what the page asks for ---


async def answer(request: web.Request, work: Callable[[Judging], Any]) -> web.Response:
    """What `work` makes of the run that is asked for, or one sentence on why not."""
    run = RUNS.get(request.match_info["run"])
    if run is None:
        return web.json_response(
            {"error": "These pictures are no longer there. Run the graph again, then go on."}, status=404
        )
    try:
        return web.json_response(await asyncio.to_thread(work, run))
    except (ValueError, OSError, RecursionError) as error:  # `DiffLensError` is the first
        return web.json_response({"error": str(error)}, status=400)


async def show_pairs(request: web.Request) -> web.Response:
    judge = request.query.get("judge", "")
    return await answer(request, lambda run: pairs_for(run, check_name(judge, "the judge's name")))


async def take_judgement(request: web.Request) -> web.Response:
    if request.content_length is None or request.content_length > LARGEST_BODY:
        return web.json_response({"error": f"a judgement has at most {LARGEST_BODY} bytes."}, status=413)
    body = await request.read()
    return await answer(request, lambda run: {"judged": hand_in(run, json.loads(body))})


def serve_judging() -> None:
    """Answer the page that shows pairs and hands in judgements."""
    PromptServer.instance.routes.get(ROUTE)(show_pairs)
    PromptServer.instance.routes.post(ROUTE)(take_judgement)
