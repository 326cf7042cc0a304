"""What capture into a store costs: time beside plain sampling of the avatars, and main memory by number of pictures.

    python benchmarks/run.py --only capture

Time is the median over pairs that take turns. Memory is the peak of what the process alone holds, Python and torch
included (anonymous pages; those of mapped files are the system's to drop), while a stub sampler gives activations of
the avatars' shape at one step and while all of them are read again. Needs 1.7 GB of disk for a moment.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from debias import AVATARS, STEPS

from difflens_core.activations import SAMPLES, Index, capture, record
from difflens_core.networks import DenoiserSampler, load_denoiser, sample, start_noise

BATCH, PAIRS = 32, 7
PICTURES, SHARD = (1_000, 10_000, 50_000), 64
SHAPE = (1, SHARD, 8, 8, 256)  # steps, pictures, map, channels


def timing() -> dict:
    """Seconds to sample a batch of avatars, with and without capture into a store."""
    model, noise = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors"), start_noise(BATCH, seed=1)
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(-1, PAIRS):  # the first warms up
        for captured in (pair % 2 == 0, pair % 2 != 0):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                if captured:
                    capture(DenoiserSampler(model, STEPS), BATCH, 1, BATCH, folder=folder)
                else:
                    sample(model, noise, STEPS)
                if pair >= 0:
                    times[captured].append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    ours, peer = (statistics.median(times[captured]) for captured in (True, False))
    size = f"{BATCH} avatars, {STEPS} steps"
    return row("capture, seconds", size, ours, peer, "plain sampling", ratio)


def row(name: str, size: str, ours: float, peer: float, peer_name: str, ratio: float) -> dict:
    return {"name": name, "size": size, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio}


def anonymous() -> float:
    """MB that only this process holds (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


class Peak(threading.Thread):
    """Looks at `anonymous` every few milliseconds while open; `value` is the most it saw."""

    def __enter__(self) -> Peak:
        self.value, self.done = anonymous(), threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.value = max(self.value, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def memory(pictures: int) -> dict:
    """Peak MB of a capture of so many pictures and of reading it, beside the size of the activations."""
    index = Index(("middle_block",), (0.0,), pictures, SHARD, 0, "stub")
    values = torch.randn(SHAPE).half()

    def draw(first: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"middle_block": (values + first / pictures)[:, : len(noise)], SAMPLES: noise}

    noises = (torch.zeros(len(index.pictures_of(shard)), 1) for shard in range(index.shards))
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        activations = record(index, noises, draw, folder).activations()
        seen = sum(len(batch) for _, batch in activations.batches(0))
        for step in range(20):
            activations.rows(activations.draw(2048, 0, step))
    if seen != pictures:
        raise SystemExit(f"{seen} of {pictures} pictures were read")
    whole = pictures * values[0, 0].numel() * 2 / 2**20
    return row("capture, peak MB", f"{pictures} pictures", peak.value, whole, "all activations", peak.value / whole)


def rows() -> list[dict]:
    """Rows of `name, size, ours, peer, peer_name, ratio`."""
    return [timing(), *(memory(pictures) for pictures in PICTURES)]
