"""Broken files by the thousand: what became of them, counted. The work is done by `worker.py` in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
SHOWN = 20  # crashes that are kept of each format


@dataclass
class Tally:
    """What became of a format's files: numbers 0 to `tried` - 1."""

    tried: int = 0
    refused: int = 0
    loaded: int = 0
    crashed: int = 0
    slowest: float = 0.0
    most: int = 0
    crashes: list[str] = field(default_factory=list)

    def count(self, found: dict[str, Any]) -> None:
        """Add what the worker says of one file."""
        self.tried += 1
        outcome = found["outcome"]
        setattr(self, outcome, getattr(self, outcome) + 1)
        self.slowest, self.most = max(self.slowest, found["seconds"]), max(self.most, found["memory"])
        if outcome == "crashed" and len(self.crashes) < SHOWN:
            self.crashes.append(f"{found['format']} {found['number']}: {found['why']}")


def outcomes(names: Sequence[str], first: int, count: int) -> Iterator[dict[str, Any]]:
    """What the worker says of `count` files of each format. One of which it dies has crashed, and the next follow."""
    while names:
        command = [sys.executable, str(WORKER), str(first), str(count), *names]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            at, number = 0, first
            try:
                for line in process.stdout:
                    found = json.loads(line)
                    yield found
                    at, number = names.index(found["format"]), found["number"] + 1
            except GeneratorExit:  # whoever asked has heard enough
                process.kill()
                raise
        if process.returncode == 0:
            return
        if number == first and at == 0:
            raise RuntimeError(f"the worker ended with {process.returncode} before it had loaded a file")
        if number == first + count:  # it died of the next format's first
            at, number = at + 1, first
        if at == len(names):
            return
        why = f"the process ended with {process.returncode}"
        yield {
            "format": names[at], "number": number, "outcome": "crashed", "why": why, "seconds": 0.0, "memory": 0,
        }  # fmt: skip
        yield from outcomes(names[at : at + 1], number + 1, first + count - number - 1)
        names = names[at + 1 :]


def tally(names: Sequence[str], count: int) -> dict[str, Tally]:
    """What became of the first `count` files of each format."""
    found = {name: Tally() for name in names}
    for one in outcomes(names, 0, count):
        found[one["format"]].count(one)
    return found


HEADS = ("format", "files", "refused", "loaded", "crashed", "slowest, s", "most memory, MB")


def table(found: dict[str, Tally]) -> str:
    """A line a format, as docs/survived.md shows it."""
    rows = [HEADS, ("---",) + ("---:",) * (len(HEADS) - 1)]
    for name, one in found.items():
        counts = one.tried, one.refused, one.loaded, one.crashed
        rows.append((name, *(f"{n:,}".replace(",", " ") for n in counts), f"{one.slowest:.1f}", str(one.most >> 20)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
