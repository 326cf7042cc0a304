"""What a running node shows: errors by its name, progress with Cancel, and pictures."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...difflens_core.files import DiffLensError, NotWritten

log = logging.getLogger("difflens")
for kind in (DiffLensError, NotWritten):
    kind.__module__ = "builtins"  # so that the page shows the error's name alone, not where the pack lies on the disk
EVERY = 5.0  # seconds between two words on the time left
_told: dict[str, str] = {}  # what stands on the nodes
_timed: set[str] = set()  # those on which the time left stands


@contextmanager
def named(node: str) -> Iterator[None]:
    """Let the `DiffLensError`s raised inside begin with the node's name."""
    try:
        yield
    except DiffLensError as error:
        text = str(error).removeprefix(f"{node}: ")
        raise DiffLensError(f"{node}: {text}") from error


def clear_errors(execute: Callable) -> Callable:
    """Decorator of a node's `execute`: errors begin with the node's display name."""

    @functools.wraps(execute)
    def wrapper(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        _told.pop(node_id() or "", None)
        try:
            with named(cls.define_schema().display_name):
                return execute(cls, *args, **kwargs)
        finally:
            forget_time()

    return wrapper


def forget_time() -> None:
    """Take the time left off the node that is being executed: it is done, by Cancel or an error, too."""
    node = node_id()
    if node in _timed:
        _timed.remove(node)
        show(node, _told.get(node, ""))


def tell(node_id: str | None, text: str) -> None:
    """Show a text on a node of the page, until it is run again."""
    if node_id is not None:
        _told[node_id] = text
        show(node_id, text)


def show(node_id: str, text: str) -> None:
    """Show a text on a node of the page, instead of what is there."""
    if getattr(PromptServer, "instance", None):
        PromptServer.instance.send_progress_text(text, node_id)


def node_id() -> str | None:
    """Which node of the page is being executed, for `tell`."""
    context = get_executing_context()
    return context and context.node_id


def warn(cls: type[io.ComfyNode], sentences: Sequence[str]) -> None:
    """Show sentences on the node that is being executed, and log them."""
    for sentence in sentences:
        log.warning("%s: %s", cls.define_schema().display_name, sentence)
    if sentences:
        tell(node_id(), " ".join(sentences))


Preview = tuple[str, Image.Image, int]


@dataclass
class TimeLeft:
    """How much longer work takes, by the time that its parts took so far; began: when how much was done, last: told."""

    began: tuple[float, int] | None = None
    last: float = 0.0

    def told(self, done: int, total: int, now: float) -> str | None:
        """A sentence, every few seconds; "" when all is done, None where there is nothing new to tell."""
        start, first = self.began = self.began or (now, done)
        if done >= total:
            return "" if self.last else None
        if done <= first or now - max(start, self.last) < EVERY:
            return None
        left = (now - start) * (total - done) / (done - first)
        if not self.last and left < EVERY:
            return None
        self.last = now
        return f"{in_words(left)} left"


def in_words(seconds: float) -> str:
    """A length of time, roughly."""
    if seconds < 90:
        return "about a minute" if seconds > 45 else "less than a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.0f} hours" if seconds > 2.5 * 3600 else f"about {seconds / 3600:.1f} hours"


def progress_of_total() -> Callable[[int, int, Preview | None], None]:
    """A function to call with the work done so far, all there is to do, and maybe a preview.

    It shows the time left on the node, and raises when the user has pressed Cancel.
    """
    bar, clock, node = comfy.utils.ProgressBar(1), TimeLeft(), node_id()

    def report(done: int, total: int, preview: Preview | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, preview)
        time_left = clock.told(done, total, time.monotonic())
        if node is not None and time_left is not None:
            _timed.add(node)
            show(node, " ".join(filter(None, [_told.get(node), time_left])))

    return report


def progress_bar(total: int) -> Callable[[int, Preview | None], None]:
    """The same for work whose size is known."""
    report = progress_of_total()
    return lambda done, preview=None: report(done, total, preview)


def preview(picture: np.ndarray) -> Preview:
    """A picture (H x W x 3, uint8) for `progress_bar`."""
    return "JPEG", Image.fromarray(picture), max(picture.shape[:2])


def to_image(picture: np.ndarray) -> Tensor:
    """A picture (H x W x 3, uint8) as an IMAGE (1 x H x W x 3 in [0, 1])."""
    return torch.from_numpy(picture).float().div(255)[None]


def drawn(
    cls: type[io.ComfyNode], image: Tensor, *outputs: Any, text: str | None = None, **more: Any
) -> io.NodeOutput:  # fmt: skip
    """Outputs of a node that also draws `image` on itself; `text` joins it in the prompt's history, with `more`."""
    shown = ui.PreviewImage(image, cls=cls).as_dict() | more
    if text is not None:
        shown["text"] = (text,)
    return io.NodeOutput(*outputs, ui=shown)


@contextmanager
def training() -> Iterator[None]:
    """Lift ComfyUI's inference mode. Tensors that the autograd graph keeps must be cloned inside."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def training_device(needed: int, advice: str) -> torch.device:
    """The device that ComfyUI computes on, with `needed` bytes freed of models that can be loaded again.

    The processor where the device has no room for it, which is told. Raises `DiffLensError` with `advice` if it has
    none, either.
    """
    device, processor = comfy.model_management.get_torch_device(), torch.device("cpu")
    comfy.model_management.free_memory(needed, device)
    if needed <= comfy.model_management.get_free_memory(device):
        return device
    free = comfy.model_management.get_free_memory(processor)
    if needed > free:
        raise DiffLensError(f"it takes {needed / 1e9:.1f} GB of memory, where {free / 1e9:.1f} GB are free. {advice}")
    tell(node_id(), f"takes {needed / 1e9:.1f} GB, more than are free on {device}, so the processor computes it.")
    return processor


def make_room(needed: int, device: torch.device) -> None:
    """Free `needed` bytes of models that are not in use: for what is held while others are."""
    in_use = [loaded for loaded in comfy.model_management.current_loaded_models if loaded.currently_used]
    comfy.model_management.free_memory(needed, device, keep_loaded=in_use)
