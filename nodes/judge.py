"""The node with which people judge pairs of pictures, blind."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.files import DiffLensError
from ..difflens_core.measure import (
    Judged,
    check_name,
    judged_figures,
    last_said,
    pairs_of,
    read_judgements,
    with_catches,
)
from ..difflens_core.report import judged_text
from . import host
from .inputs import seed_input
from .report import size_of, to_bytes
from .sockets import CATEGORY, JudgementsSocket


class JudgeByEye(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensJudge",
            display_name="Judge by Eye",
            category=CATEGORY,
            description="Shows people pairs of pictures in random order, without saying which is which, and asks which "
            "looks better and what changed. Press the button on the node after a run, and run again to count.",
            search_aliases=[
                "human evaluation", "user study", "survey", "blind test", "A/B test", "preference", "vote", "rate",
                "compare", "side by side",
            ],
            inputs=[
                io.Image.Input("first", tooltip="Pictures such as those of the model as it is."),
                io.Image.Input(
                    "second",
                    tooltip="As many pictures of the same size, from the same seed, such as steered ones, or those of "
                    "another recipe.",
                ),
                io.String.Input(
                    "names",
                    default="before\nafter",
                    multiline=True,
                    tooltip="What the first and the second pictures are called in the report, a line each. Judges are "
                    "not told.",
                ),
                io.String.Input(
                    "attribute",
                    default="",
                    tooltip="What was steered, such as age: judges may then say that it changed. Empty: they are not "
                    "asked.",
                ),
                io.String.Input(
                    "save_as",
                    default="difflens/judgements",
                    tooltip="Name of a CSV file in ComfyUI's output folder, to which every judgement is added. Several "
                    "people may judge into one file.",
                ),
                seed_input("Order and sides of the pairs, which differ from judge to judge."),
                io.Int.Input(
                    "catch_pairs",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    optional=True,
                    tooltip="So many more pairs show one picture twice. The report tells how often that was seen, and "
                    "counts them for nothing else.",
                ),
            ],
            outputs=[
                JudgementsSocket.Output(display_name="judgements", tooltip="For Fairness Report."),
                io.String.Output(display_name="text", tooltip="What people said so far."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, **_: Any) -> str:
        """What was judged since is counted."""
        return host.on_disk(host.judgement_file(save_as)) if save_as else ""

    @classmethod
    @host.clear_errors
    def execute(
        cls, first: Tensor, second: Tensor, names: str, attribute: str, save_as: str, seed: int, catch_pairs: int = 0
    ) -> io.NodeOutput:
        if first.shape[:3] != second.shape[:3]:
            raise DiffLensError(
                f"first holds {size_of(first)}, second {size_of(second)}; they are judged one by one. Give as many "
                "pictures of the same size to both."
            )
        path, called = host.judgement_file(save_as), names_of(names)
        sides = with_catches(to_bytes(first), to_bytes(second), catch_pairs, seed)
        pairs = pairs_of(*sides)
        said = read_judgements(path)
        judged = Judged(called, attribute.strip(), pairs, len(pairs) - len(first), last_said(said, pairs))
        run = host.begin_judging(judged, *sides, path, seed, host.progress_bar(len(pairs)))
        figures = judged_figures(judged)
        host.tell(host.node_id(), progress_of(judged, len({one.pictures for one in said} - {p.mark for p in pairs})))
        text = judged_text(figures)
        return io.NodeOutput(judged, text, ui={"text": (text,), "judging": (run,)})


def names_of(text: str) -> tuple[str, str]:
    """What the first and the second pictures are called. Raises `DiffLensError` if that is not told."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 2:
        raise DiffLensError(f"names has {len(lines)} lines. Give a name to the first and to the second pictures.")
    first, second = (check_name(line, "the name") for line in lines)
    if first == second:
        raise DiffLensError(f"both pictures are called {first!r}. Give them two names.")
    return first, second


def progress_of(judged: Judged, others: int) -> str:
    """Who judged how many of the pairs, and that `others` in the file are of other pictures."""
    judges: dict[str, int] = {}
    for one in judged.judgements:
        judges[one.judge] = judges.get(one.judge, 0) + 1
    total = len(judged.pairs)
    told = "; ".join(f"{judge} judged {count} of {total} pairs" for judge, count in judges.items())
    told = f"{told}." if told else f"None of {total} pairs judged yet: press the button."
    return f"{told} The file also has {others} pairs of other pictures, which do not count." if others else told
