"""difflens: capture, train, attribute, calibrate, steer, report and export one study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import DiffLensError
from ..processes import together
from .console import Console
from .fairness import run_report, run_steer
from .finding import run_attribute, run_calibrate, run_capture, run_export, run_train
from .study import read_study

COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "capture": run_capture, "train": run_train, "attribute": run_attribute, "calibrate": run_calibrate,
    "steer": run_steer, "report": run_report, "export": run_export,
}  # fmt: skip
DONE, FAILED, MISSED, CUT_OFF = 0, 1, 3, 130  # exit codes; 2 is argparse's own, for a command that is misspelt
HELP = """
A study is a TOML file; all that is made of it lies in a folder of its name beside it. Run the commands in this order,
export whenever there is a recipe.
Each can be cut off with Ctrl+C and goes on where it stopped when it is run again. capture and train may run under
torchrun, in several processes. Exit codes: 0 done, 1 something does not fit (one sentence says what), 2 the command is
misspelt, 3 calibrate has missed the target, 130 cut off.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("difflens", description=__doc__, epilog=HELP)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command_of in COMMANDS.items():
        about = str(command_of.__doc__).splitlines()[0]
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("study", type=Path, help="the study's TOML file")
        command.add_argument("--json", action="store_true", help="print the figures as JSON, all else to stderr")
        if name == "report":
            command.add_argument(
                "before", type=Path, nargs="?", help="a folder of pictures, instead of the study's own"
            )
            command.add_argument("after", type=Path, nargs="?", help="as many pictures to compare with")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    given = vars(parse(arguments))
    command, as_json = given.pop("command"), given.pop("json")
    try:
        study = read_study(given.pop("study"))
        with together(study.computes_on) as leads:
            console = Console(as_json, leads)
            found = COMMANDS[command](study, console, **given)
            console.figures(found)
    except DiffLensError as error:
        print(f"difflens {command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"difflens {command}: cut off. Run the same command again, and it goes on.", file=sys.stderr)
        return CUT_OFF
    return MISSED if command == "calibrate" and not found["reached"] else DONE
