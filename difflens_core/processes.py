"""Several processes that work on one thing under torchrun, or must not; a process by itself is the first of one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from .files import DiffLensError, written

try:
    import fcntl
except ImportError:  # Windows, where nobody can take away a file that is being written
    fcntl = None  # type: ignore[assignment]


def process() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_device() -> str:
    """This process's GPU if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While open, no other process may open this for the folder. The system sees to it, also if this one is killed.

    The folder is made if need be. Where the file system knows no locks, nobody is kept out. Raises `DiffLensError` if
    another process is in, and `NotWritten`.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DiffLensError(
                    f"another process is writing into {folder}. Wait until it is done, or choose another name."
                ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def together(device: str) -> Iterator[bool]:
    """Join the others that torchrun started, to compute on `device`; tells whether this is the one that speaks."""
    if "RANK" not in os.environ:
        yield True
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield process()[0] == 0
        gc.collect()  # DistributedDataParallel must be gone before its process group, and
        dist.barrier()  # nobody may leave while another still works.
    finally:
        dist.destroy_process_group()
