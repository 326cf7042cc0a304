"""Several processes that work on one thing under torchrun; a process by itself is the first of one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def process() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_device() -> str:
    """This process's GPU if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


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
