"""Pictures that can be differentiated by what a site puts out, also where a host loads networks for inference only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Told a step's number, what a site puts out there (B x C x H x W), and the finished pictures (B x H x W x 3 in [0, 1])
# that the network predicts from it, which can be differentiated by it.
OnPrediction = Callable[[int, Tensor, Tensor], None]


@dataclass
class Leaf:
    """An edit that changes nothing: what comes after `site` can be differentiated by `h`, what it put out.

    Where it runs several times a step, for several prompts, `h` is of the first, and the gradient the sum over all.
    """

    site: str
    h: Tensor | None = None
    progress: float = -1.0

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        if self.h is None or progress != self.progress:
            self.h, self.progress = h.detach().clone().requires_grad_(), progress
            return self.h.clone()  # a block after it may write into it
        return h.detach() + (self.h - self.h.detach()) if h.shape == self.h.shape else h


@contextmanager
def differentiable(*modules: nn.Module) -> Iterator[None]:
    """While open, operations are recorded, and modules that were loaded in inference mode take part.

    PyTorch refuses to record what reads a tensor made in inference mode. For the time being such weights are replaced
    by tensors that share their memory, so nothing is copied. Those that a host replaces meanwhile are left to it.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad():
        for module in (part for whole in modules for part in whole.modules()):
            own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in own:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        shared = torch.from_dlpack(tensor.detach())
                        tensors[name] = nn.Parameter(shared, False) if isinstance(tensor, nn.Parameter) else shared
                        replaced.append((tensors, name, tensor, tensors[name]))
        try:
            yield
        finally:
            for tensors, name, tensor, shared in replaced:
                if tensors.get(name) is shared:
                    tensors[name] = tensor
