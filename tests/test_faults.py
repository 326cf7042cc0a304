"""What is lost by kills, full disks, other processes and clocks that jump: nothing that was said to be saved.

python scripts/test.py --slow tests/test_faults.py     the long form: 50 kills of each job
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if sys.platform != "linux":
    pytest.skip("disks are mounted and processes forked as Linux does it", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent))

import faults  # noqa: E402

from difflens_core.activations import capture, open_store  # noqa: E402
from difflens_core.commands.__main__ import main  # noqa: E402
from difflens_core.commands.finding import FOUND, RECIPE, SAE, STORE  # noqa: E402
from difflens_core.commands.pictures import read_picture  # noqa: E402
from difflens_core.files import DiffLensError, load_tensors, save_tensors, write_whole  # noqa: E402
from difflens_core.networks import DenoiserSampler  # noqa: E402
from difflens_core.processes import alone_in  # noqa: E402

JOBS = ("capture", "training", "calibration", "saving")
LONG = ["capture", pytest.param("training", marks=pytest.mark.slow), "calibration", "saving"]


@pytest.fixture(scope="module")
def jobs(toys):
    return faults.jobs(toys)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_loses_nothing_and_ends_with_the_same_result(jobs, tmp_path, name, kills):
    killed = faults.disturbed(jobs[name], tmp_path, kills, seed=kills)
    assert len(killed) == kills
    print(f"{name}: killed {kills} times, {killed.count('after a time')} of them after a time")


@pytest.mark.slow
def test_a_killed_study_loses_nothing_and_ends_with_the_same_files(tmp_path):
    """The commands one after the other, each gone on with as a user would: typed again from the first."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "commands"))
    from test_commands import study_of

    told = study_of(tmp_path / "given", "avatars").read_text()
    told = told.replace("classifier.safetensors", str(tmp_path / "given" / "classifier.safetensors"))

    def work(folder: Path, report: faults.Report) -> str:
        write_whole(folder / "study.toml", told.encode())
        for command in ("capture", "train", "attribute", "calibrate", "steer"):
            assert main([command, str(folder / "study.toml")]) in (0, 3)
            report(command)
        return faults.digest_of(*(path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."))

    def check(folder: Path, reported: list[str]) -> None:
        """Every file can be read, and what a command that was done leaves is there."""
        readers = {".safetensors": load_file, ".json": lambda path: json.loads(path.read_text()), ".png": read_picture}
        for path in folder.rglob("[!.]*.*"):
            readers.get(path.suffix, Path.read_bytes)(path)
        made = {"capture": STORE, "train": SAE, "attribute": FOUND, "calibrate": RECIPE, "steer": "report.json"}
        assert all((folder / "study" / made[command]).exists() for command in reported)

    killed = faults.disturbed(faults.Job(work, check), tmp_path, 50, seed=50)
    assert len(killed) == 50


# --- disks ---


def whole(job, folder: Path) -> tuple[str, int]:
    """The job's result, and the size of its largest file."""
    folder.mkdir()
    return job.work(folder, lambda *_: None), max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", JOBS)
def test_where_files_cannot_grow_it_is_said_and_gone_on_when_they_can(jobs, tmp_path, name):
    job, cut = jobs[name], tmp_path / "cut"
    expected, largest = whole(job, tmp_path / "whole")
    cut.mkdir()
    reported: list[str] = []
    with faults.no_larger_than(largest * 2 // 3), pytest.raises(DiffLensError, match="could not be written: File too"):
        job.work(cut, lambda *said: reported.extend(said))
    assert not [*cut.rglob(".*.tmp")]
    job.check(cut, reported)
    assert job.work(cut, lambda *_: None) == expected


@pytest.mark.parametrize("name", LONG)
def test_a_full_disk_is_said_and_what_was_reported_is_there(jobs, tmp_path, name):
    if not faults.may_mount(tmp_path / "try"):
        pytest.skip("only root can make a small disk")
    job, cut = jobs[name], tmp_path / "cut"
    expected, _ = whole(job, tmp_path / "whole")
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "whole").rglob("*") if path.is_file())
    reported: list[str] = []
    with faults.small_disk(cut, 4096 * (pages // 2)) as remount:
        with pytest.raises(DiffLensError, match="could not be written: No space left on device. Make room on the disk"):
            job.work(cut, lambda *said: reported.extend(said))
        assert not [*cut.rglob(".*.tmp")], "what could not be written takes no room"
        job.check(cut, reported)
        remount("size=64m")
        assert job.work(cut, lambda *_: None) == expected


@pytest.mark.parametrize("name", LONG)
def test_a_folder_that_cannot_be_written_to_is_named(jobs, tmp_path, name):
    cut = tmp_path / "cut"
    if faults.may_mount(tmp_path / "try"):
        with faults.small_disk(cut, 1 << 20) as remount:
            remount("ro")
            with pytest.raises(
                DiffLensError, match=f"{cut}.* could not be written: Read-only file system. Choose a fo"
            ):
                jobs[name].work(cut, lambda *_: None)
    else:
        cut.mkdir(mode=0o555)
        with pytest.raises(
            DiffLensError, match=f"{cut}.* could not be written: Permission denied. See that its folder"
        ):
            jobs[name].work(cut, lambda *_: None)
        cut.chmod(0o755)


# --- memory ---


@pytest.mark.slow  # it depends on how much the process holds before
def test_a_capture_without_memory_for_a_batch_goes_on_with_half_of_it(toys):
    """Truly without: in a process that may not have more. What it keeps is what one does which may."""
    sampler = DenoiserSampler(toys.denoiser(size=64, outer_width=32), 2)

    def short_of_memory() -> None:
        torch.backends.mkldnn.enabled = False  # it would need memory for code of its own, however few the pictures
        halves: list[int] = []
        with faults.no_more_memory_than(60_000_000):
            found = capture(sampler, 160, 0, 160, on_half=halves.append)
        expected = capture(sampler, 160, 0, 160)
        assert halves and halves == [80, 40, 20, 10][: len(halves)]
        torch.testing.assert_close(found.samples(), expected.samples(), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.activations().values, expected.activations().values, atol=1e-2, rtol=1e-2)

    assert faults.ended(faults.forked(short_of_memory), 600) == 0


def run_out(sampler: DenoiserSampler, most: int, error: Exception):
    """The sampler, which fails for more pictures at once, and tells how many it draws."""

    class Small(DenoiserSampler):
        def sample(self, noise, images, edits=(), kept=()):
            tried.append(len(noise))
            if len(noise) > most:
                raise error
            return super().sample(noise, images, edits, kept)

    tried: list[int] = []
    return Small(sampler.model, sampler.steps), tried


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
    ],
    ids=["CUDA", "Python", "MPS"],
)
def test_half_is_tried_until_it_fits_and_then_no_more_than_that(toys, error):
    sampler, said = DenoiserSampler(toys.denoiser(), 1), []
    small, tried = run_out(sampler, 3, error)
    found, expected = capture(small, 18, 0, 9, on_half=said.append), capture(sampler, 18, 0, 9)
    assert said == [5, 3] and tried == [9, 5, 3, 3, 3, 3, 3, 3]
    assert found.index == expected.index and [len(shard["samples"]) for shard in found.shards] == [9, 9]
    torch.testing.assert_close(found.samples(), expected.samples(), atol=1e-5, rtol=0)
    small, _ = run_out(sampler, 0, error)
    with pytest.raises(DiffLensError, match="not enough memory to draw a single picture .*Draw smaller pictures"):
        capture(small, 2, 0, 2)
    small, tried = run_out(sampler, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        capture(small, 2, 0, 2)
    assert tried == [2], "another error is no lack of memory"


# --- several processes ---


def test_a_store_is_written_by_one_process_at_a_time_and_free_when_that_is_killed(toys, tmp_path):
    sampler, folder = DenoiserSampler(toys.denoiser(), 2), tmp_path / "s"

    def stop(done: int) -> None:
        if done == 4:
            (tmp_path / "there").touch()
            signal.pause()

    child = faults.forked(lambda: capture(sampler, 6, 0, 2, folder=folder, on_batch=stop))
    try:
        while not (tmp_path / "there").exists():
            assert faults.ended(child, 0.01) is None
        (folder / ".shard.tmp").touch()  # of a shard that the other one is writing
        with pytest.raises(DiffLensError, match=f"another process is writing into {folder}. Wait until it is done"):
            capture(sampler, 6, 0, 2, folder=folder)
        assert (folder / ".shard.tmp").exists(), "what another one writes is left alone"
        with pytest.raises(DiffLensError, match="2 of 3 shards are missing"):
            open_store(folder)
    finally:
        os.kill(child, signal.SIGKILL)
    assert faults.ended(child, 600) == -signal.SIGKILL
    drawn = []
    found = capture(sampler, 6, 0, 2, folder=folder, on_batch=drawn.append)
    assert drawn == [4, 6] and not (folder / ".shard.tmp").exists()
    assert torch.equal(found.samples(), capture(sampler, 6, 0, 2).samples())
    with alone_in(folder):
        pass


def test_a_file_that_windows_keeps_from_being_replaced_is_named_and_written_later(toys, tmp_path, monkeypatch):
    """There, no folder can be locked, and what another program holds open can neither be replaced nor removed."""
    sampler, folder, replace = DenoiserSampler(toys.denoiser(), 2), tmp_path / "s", os.replace
    words = "The process cannot access the file because it is being used by another process"

    def held(source: Path, target: Path) -> None:
        if Path(target).name.startswith("shard_00001"):
            raise PermissionError(errno.EACCES, words)
        replace(source, target)

    monkeypatch.setattr("difflens_core.processes.fcntl", None)
    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(DiffLensError, match=f"shard_00001.* could not be written: {words}. See that .* has it open"):
        capture(sampler, 6, 0, 2, folder=folder)
    assert not [*folder.glob(".*.tmp")]
    monkeypatch.setattr(os, "replace", replace)
    drawn: list[int] = []
    found = capture(sampler, 6, 0, 2, folder=folder, on_batch=drawn.append)
    assert drawn == [4, 6] and torch.equal(found.samples(), capture(sampler, 6, 0, 2).samples())


@pytest.mark.parametrize("name", [LONG[1], "calibration"])
def test_two_processes_at_one_job_in_one_folder_end_with_its_result(jobs, tmp_path, name):
    """They need not be kept apart: both write the same, each file whole."""
    expected, _ = whole(jobs[name], tmp_path / "whole")
    both = tmp_path / "both"
    both.mkdir()

    def work(number: int):
        return lambda: (tmp_path / f"{number}").write_text(jobs[name].work(both, lambda *_: None))

    children = [faults.forked(work(number)) for number in range(2)]
    assert [faults.ended(child, 600) for child in children] == [0, 0]
    assert [(tmp_path / f"{number}").read_text() for number in range(2)] == [expected] * 2
    assert not [*both.rglob(".*.tmp")]


# --- clocks, and files that change ---


@pytest.mark.parametrize("when", [0, 2**32], ids=["1970", "2106"])
@pytest.mark.parametrize("name", LONG)
def test_a_clock_that_jumps_changes_nothing(jobs, tmp_path, name, when):
    """The files of work that was cut off seem to be of long ago, or of the future."""
    job, cut = jobs[name], tmp_path / "cut"
    expected, _ = whole(job, tmp_path / "whole")
    cut.mkdir()
    said: list[str] = []

    def stop(*saved: str) -> None:
        said.extend(saved)
        if said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.work(cut, stop)
    for path in cut.rglob("*"):
        os.utime(path, (when, when))
    job.check(cut, said)
    assert job.work(cut, lambda *_: None) == expected


def written_over(path: Path, ready: threading.Event, stop: threading.Event) -> None:
    """Write other numbers into a file of 32 MB, in place and never all at once, until told to stop."""
    with path.open("r+b", buffering=0) as file:
        for number in range(10**6):
            file.seek(1 << 20)
            for _ in range(30):
                file.write(bytes([number % 100]) * (1 << 20))
                ready.set()
                time.sleep(0.002)
                if stop.is_set():
                    return


def test_a_file_that_is_written_over_while_it_is_read_is_not_taken_for_whole(tmp_path):
    path, ready, stop = tmp_path / "a.safetensors", threading.Event(), threading.Event()
    save_tensors(path, "sae", {"a": torch.zeros(1 << 25, dtype=torch.uint8)}, {})
    writer = threading.Thread(target=written_over, args=(path, ready, stop))
    writer.start()
    try:
        ready.wait(60)
        with pytest.raises(DiffLensError, match="a.safetensors: .*another program wrote to it while it was read"):
            for _ in range(200):
                load_tensors(path, "sae")
    finally:
        stop.set()
        writer.join()
    load_tensors(path, "sae")


def test_a_file_that_is_cut_off_while_it_is_read_ends_no_process(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, "sae", {"a": torch.zeros(1 << 25, dtype=torch.uint8)}, {})
    content = path.read_bytes()

    def load_often() -> None:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                load_tensors(path, "sae")
            except DiffLensError as error:
                assert str(error).startswith("a.safetensors: ")

    child = faults.forked(load_often)
    code = None
    while code is None:
        with path.open("r+b") as file:
            file.truncate(100)
            time.sleep(0.003)
            file.write(content)
        code = faults.ended(child, 0.003)
    assert code == 0


# --- numbers that are none ---


def test_nan_is_named_with_its_site_its_step_and_its_pictures(toys, tmp_path):
    class Spoilt(DenoiserSampler):
        def sample(self, noise, images, edits=(), kept=()):
            drawn = super().sample(noise, images, edits, kept)
            for one in kept:
                one.values = one.values.clone()
                one.values[2, images == 3] = torch.nan
            return drawn

    with pytest.raises(
        DiffLensError, match="middle_block puts out .*, first at 50% of the sampling, in picture 3. Che"
    ):
        capture(Spoilt(toys.denoiser(), 4), 4, 0, 4, folder=tmp_path / "s")
    assert not [*(tmp_path / "s").glob("shard*")]


def test_pictures_that_are_nan_are_refused_also_where_their_site_is_not(toys):
    class Spoilt(DenoiserSampler):
        def sample(self, noise, images, edits=(), kept=()):
            drawn = super().sample(noise, images, edits, kept).clone()
            drawn[images % 2 == 1] = torch.inf
            return drawn

    with pytest.raises(
        DiffLensError, match="pictures 1, 3 came out as NaN or infinite numbers, though middle_block did"
    ):
        capture(Spoilt(toys.denoiser(), 4), 4, 0, 4)
