"""Reading and changing what a module of the denoiser puts out, and the activations read that way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .files import DiffLensError


@dataclass(frozen=True)
class Activations:
    """What a site put out while a set of pictures was sampled.

    values: S x B x C x H x W (steps, pictures, channels, map), fp16 or fp32, on the CPU;
    progress: S, share of the sampling that lies behind each step; site: module name.
    """

    values: Tensor
    progress: Tensor
    site: str

    def __post_init__(self) -> None:
        if self.values.ndim != 5 or 0 in self.values.shape:
            raise DiffLensError(
                f"activations have shape {tuple(self.values.shape)}, expected steps x pictures x channels x height x "
                "width with at least one of each. Capture at least one picture."
            )

    @property
    def pictures(self) -> int:
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]


def find_site(model: nn.Module, site: str) -> nn.Module:
    """The submodule called `site`. Raises `DiffLensError` that names the model and some of its modules if absent."""
    try:
        return model.get_submodule(site)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise DiffLensError(f"{type(model).__name__} has no module {site}. It has: {known}.") from None


@contextmanager
def edit_site(model: nn.Module, site: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, the output of module `site` is replaced by `edit(output)`. Leaves no hook behind."""
    handle = find_site(model, site).register_forward_hook(lambda _module, _inputs, output: edit(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_site(model: nn.Module, site: str, dtype: torch.dtype = torch.float16) -> Iterator[list[Tensor]]:
    """While open, every output of module `site` is copied to the CPU and appended to the list that is yielded."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        # A copy, because later layers of some models write into this tensor.
        outputs.append(output.detach().to("cpu", dtype, copy=True))

    handle = find_site(model, site).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
