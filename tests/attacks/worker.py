"""Loads broken files one by one, in a process of its own that is watched: python worker.py FIRST COUNT FORMAT...

Prints a line of JSON for each file. The process may die of one; whoever reads the lines knows by the last of which.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from formats import FORMATS, ROOT, good_files
from mutations import mutated

from difflens_core.files import LONGEST_MESSAGE, DiffLensError

SECONDS = 5.0  # of the processor, that a file may take
TIMES = 8  # what a file may take of memory beside its format's `spare`: so many times its size
NAME = "incr-gaussian_ot-mean"  # of the folder that a format's files are in: ml-act tells by it what they are
LIMIT = 4 * 2**30  # bytes beyond those of the process, that it cannot get
READING = ("os.listdir", "os.scandir")
FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "urllib.", "ftplib.", "smtplib.", "webbrowser.")
OURS = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, ROOT / "difflens_core", torch.__path__[0])))


class TooLong(BaseException):
    """No exception that a loader could catch."""


class Watch:
    """What Python tells of itself while a file is loaded: whether it runs, writes or reads what it must not."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" not in mode
            if writes or not self.allowed(path):
                self.seen.append(f"{event} {path!r}")
        elif event in READING:
            if not self.allowed(arguments[0]):
                self.seen.append(f"{event} {arguments[0]!r}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(event)

    def allowed(self, path: Any) -> bool:
        """Whether a path is in the folder, or one of the libraries' (which are imported when they are needed)."""
        if isinstance(path, int):  # a file that is open already
            return True
        return os.path.realpath(os.fsdecode(path)).startswith((str(self.folder), *OURS))


WATCH = Watch()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    WATCH.folder, WATCH.seen = os.path.realpath(folder), []
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        WATCH.folder = None


def stop(*_: Any) -> None:
    raise TooLong


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS, VmHWM (its highest since `forget_peak`), VmSize."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def starved(error: BaseException | None) -> bool:
    """Whether an error came of one that says that there is not so much memory."""
    words = ("allocate memory", "not enough memory", "Cannot allocate", "alloc_cpu")
    while error is not None:
        if isinstance(error, MemoryError) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def fault_of(error: DiffLensError, names: set[str]) -> str:
    """What is wrong with a sentence that a loader refused a file with, "" if nothing is."""
    said = str(error)
    if not any(name in said for name in names):
        return f"names no file: {said}"
    if not said.isprintable() or len(said) > 1.1 * LONGEST_MESSAGE:
        return f"is no sentence: {said!r}"
    return f"asked for memory that there is not: {said}" if starved(error) else ""


def trial(name: str, number: int, files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """Load one broken copy: its outcome (loaded, refused or crashed), why, processor seconds and bytes of memory."""
    broken = mutated(files, f"{name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, content in broken.items():
        (folder / file).write_bytes(content)
    size = sum(map(len, broken.values()))
    outcome, why = "loaded", ""
    forget_peak()
    before, begun = memory("VmRSS"), time.process_time()
    try:
        with watched(folder):
            FORMATS[name].load(folder)
    except DiffLensError as error:
        why = fault_of(error, {*broken, folder.name, "choice"})
        outcome = "crashed" if why else "refused"
    except TooLong:
        outcome, why = "crashed", f"took more than {SECONDS} s"
    except BaseException as error:
        outcome, why = "crashed", f"{type(error).__name__}: {error}"[:500]
    seconds, peak = time.process_time() - begun, memory("VmHWM") - before
    if WATCH.seen:
        outcome, why = "crashed", "did what it must not: " + ", ".join(WATCH.seen[:3])
    elif peak > TIMES * size + FORMATS[name].spare:
        outcome, why = "crashed", f"took {peak >> 20} MB for {size} bytes"
    return {
        "format": name, "number": number, "outcome": outcome, "why": why, "seconds": seconds, "memory": peak,
        "size": size,
    }  # fmt: skip


def main(first: int, count: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")  # torch's and PIL's, of what is odd in a file
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # where `Code` would leave its folder
        good = {}
        for name in names:
            (place := Path(scratch, f"good {len(good)}", NAME)).mkdir(parents=True)
            good[name] = good_files(name, place)
            FORMATS[name].load(place)  # a good one loads, and what that imports is there from now on
        limit = memory("VmSize") + LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name in names:
            for number in range(first, first + count):
                found = trial(name, number, good[name], Path(scratch, NAME))
                if Path(scratch, "code_was_run").exists():
                    found |= {"outcome": "crashed", "why": "ran code"}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
