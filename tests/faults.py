"""Work that is done on disk, and ways to disturb it: kills at random moments, full and read-only disks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from difflens_core.activations import Activations, capture
from difflens_core.experiments import CalibrationOptions, calibrate
from difflens_core.files import load_tensors, read_content, write_whole
from difflens_core.measure import Judgement, add_judgement, read_judgements
from difflens_core.networks import DenoiserSampler
from difflens_core.sae import TrainingOptions, load_sae, save_sae, train_sae
from difflens_core.steer import load_recipe, save_recipe

sys.path.insert(0, str(Path(__file__).resolve().parent / "experiments"))

from toy import UNIFORM, Toy, recipe  # noqa: E402

Report = Callable[[str], None]  # what a job is told to have saved


@dataclass(frozen=True)
class Job:
    """work(folder, report) does something in a folder, goes on where it was cut off, and returns its result as text.

    check(folder, reported) fails if something is there that cannot be read, or is not there and was reported.
    """

    work: Callable[[Path, Report], str]
    check: Callable[[Path, list[str]], None]


def digest_of(*paths: Path) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def files_in(folder: Path, ending: str = "*") -> list[Path]:
    """The files of a folder but those with hidden names, which are not there for anybody yet."""
    return sorted(path for path in folder.glob(ending) if not path.name.startswith("."))


# --- jobs ---


def jobs(toys: SimpleNamespace) -> dict[str, Job]:
    """What is kept on the disk, on models and data so small that a job takes a second."""
    sampler = DenoiserSampler(toys.denoiser(), 3)
    rows = Activations(toys.random(0)(2, 48, 16, 4, 4), torch.tensor([0.0, 0.5]), "middle")
    options = TrainingOptions(latents=64, k=2, steps=210, batch=32, dead_after=10, aux_k=8, seed=5)
    judged = Judgement("2026-01-01T00:00:00+00:00", "j", "p1", 1, False, "a", "b", "first", "first", ("nothing",))

    def captures(folder: Path, report: Report) -> str:
        done = []

        def tell(samples: torch.Tensor) -> bool:
            done.append(len(samples))
            report(f"shard_{len(done) - 1:05}.safetensors")
            return False

        capture(sampler, 2, 1, 2, folder=folder / "s", most=24, enough=tell)
        return digest_of(*files_in(folder / "s"))

    def shards(folder: Path, reported: list[str]) -> None:
        for name in {*reported, *(path.name for path in files_in(folder / "s", "shard_*"))}:
            load_tensors(folder / "s" / name, "activations")

    def trains(folder: Path, report: Report) -> str:
        sae = train_sae(rows, options, lambda step, *_: step % 200 == 1 < step and report(str(step - 1)), folder / "c")
        save_sae(folder / "sae.safetensors", sae)
        return digest_of(folder / "sae.safetensors")

    def checkpoint(folder: Path, reported: list[str]) -> None:
        if reported or (folder / "c").exists():
            assert read_content(folder / "c")["step"] >= max(map(int, reported), default=200)
        if (folder / "sae.safetensors").exists():
            load_sae(folder / "sae.safetensors")

    def calibrates(folder: Path, report: Report) -> str:
        toy, told = Toy(), []

        def classify(pictures: torch.Tensor) -> torch.Tensor:
            """Some pictures show no face, and do not count."""
            report(*told[-1:])
            told.append(f"{len(told)}")
            read = toy.ages(pictures)
            return torch.where(pictures[:, :1, 0, 0] < -0.2, torch.nan, read)

        found = calibrate(recipe(), toy, classify, UNIFORM, CalibrationOptions(budget=400), 20, folder / "t")
        return json.dumps(found.info, sort_keys=True)

    def readings(folder: Path, reported: list[str]) -> None:
        there = files_in(folder / "t")
        assert len(there) >= len(reported)
        for path in there:
            load_tensors(path, "calibration", ("keys", "read"))

    def saves(folder: Path, report: Report) -> str:
        """Over and over: an SAE, a recipe, a line of a CSV, each time another."""
        known = len(read_judgements(folder / "j.csv"))
        for number in range(known, 25):
            save_sae(folder / "sae.safetensors", replace(toys.sae(), info={"number": number}))
            save_recipe(folder / "recipe.safetensors", replace(toys.recipe(), info={"number": number}))
            write_whole(folder / "number.json", json.dumps(number).encode())
            add_judgement(folder / "j.csv", replace(judged, pair=number))
            report(str(number))
        return digest_of(*files_in(folder))

    def saved(folder: Path, reported: list[str]) -> None:
        last = int(max(reported, key=int, default="-1"))
        numbers = [one.pair for one in read_judgements(folder / "j.csv")]
        assert numbers == [*range(len(numbers))] and len(numbers) > last
        for name, read in (
            ("sae.safetensors", lambda path: load_sae(path).info["number"]),
            ("recipe.safetensors", lambda path: load_recipe(path).info["number"]),
            ("number.json", lambda path: json.loads(path.read_bytes())),
        ):
            if last >= 0 or (folder / name).exists():
                assert read(folder / name) in (len(numbers) - 1, len(numbers)), "the last one, or the one before"

    return {
        "capture": Job(captures, shards), "training": Job(trains, checkpoint),
        "calibration": Job(calibrates, readings), "saving": Job(saves, saved),
    }  # fmt: skip


# --- processes ---


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does the work and ends: with 0, or 1 where it raised something."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of this process are not there in the other one
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """How a process ended (negative: by which signal), None if it has not after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.0005)


def count_operations(folder: Path, at: int = 0) -> list[int]:
    """From now on, count how often this process opens, renames, removes or writes a file in the folder. At number `at`
    it dies, when writing with half of the bytes written.

    There is no way back: for processes that are about to end.
    """
    count, write = [0], Path.write_bytes

    def due(path: object) -> bool:
        inside = str(path).startswith(str(folder))
        count[0] += inside
        return inside and count[0] == at

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove") and due(args[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_or_die(path: Path, content: bytes) -> int:
        if due(path):
            write(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    Path.write_bytes = write_or_die
    sys.addaudithook(hook)
    return count


def disturbed(job: Job, folder: Path, kills: int, seed: int) -> list[str]:
    """Do the job, killed so often: after a random time, or at a random operation on a file. What it was killed in.

    Begun anew, with a check, whenever it is done; at the end it is done once more, and checked.
    """
    chance = random.Random(seed)
    told = folder / "told"

    def begin(name: str, at: int = 0) -> int:
        place = folder / name
        place.mkdir(exist_ok=True)

        def work() -> None:
            with told.open("a") as file:

                def report(*saved: str) -> None:
                    file.writelines(f"{one}\n" for one in saved)
                    file.flush()

                operations = count_operations(place, at)
                result = job.work(place, report)
            (folder / f"{name}.result").write_text(f"{operations[0]}\n{result}")

        return forked(work)

    def result(name: str) -> list[str]:
        return (folder / f"{name}.result").read_text().split("\n", 1)

    began = time.monotonic()
    assert ended(begin("whole"), 600) == 0
    took, (operations, expected) = time.monotonic() - began, result("whole")
    told.unlink()
    killed: list[str] = []
    while len(killed) < kills:
        by_time = chance.random() < 0.5
        at = 0 if by_time else chance.randint(1, int(operations))
        child = begin("cut", at)
        code = ended(child, chance.uniform(0, took) if by_time else 600)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = ended(child, 600)
        assert code in (0, -signal.SIGKILL)
        reported = told.read_text().split() if told.exists() else []
        job.check(folder / "cut", reported)
        if code:
            killed.append("after a time" if by_time else f"operation {at}")
        else:
            assert result("cut")[1] == expected
            shutil.rmtree(folder / "cut")
            told.unlink(missing_ok=True)
    assert ended(begin("cut"), 600) == 0 and result("cut")[1] == expected
    job.check(folder / "cut", told.read_text().split())
    return killed


# --- disks ---


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """While open, this process may have at most so much of a resource."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def no_larger_than(size: int) -> AbstractContextManager:
    """While open, no file of this process can grow beyond so many bytes."""
    return limited(resource.RLIMIT_FSIZE, size)


def no_more_memory_than(size: int) -> AbstractContextManager:
    """While open, this process gets at most so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + size)


def may_mount(folder: Path) -> bool:
    """Whether this process can make disks of its own."""
    try:
        with small_disk(folder, 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """While open, the folder is a disk of so many bytes. Gives a function that mounts it with other options."""
    folder.mkdir(exist_ok=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True, capture_output=True)

    mount("-o", f"size={size}")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)  # shards may still be mapped
