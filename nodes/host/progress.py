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
import latent_preview
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
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
REDRAWN = 1.0  # seconds at least between two charts of a running node
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
    """Show sentences on the node that is being executed, before what it was told, as there is little room; log them."""
    for sentence in sentences:
        log.warning("%s: %s", cls.define_schema().display_name, sentence)
    if sentences:
        tell(node_id(), " ".join([*sentences, *filter(None, [_told.get(node_id() or "")])]))


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


class LiveView:
    """What a node shows while it works: how far it is, the time left, and a chart of what it found so far."""

    def __init__(self) -> None:
        self.bar, self.clock, self.node = comfy.utils.ProgressBar(1), TimeLeft(), node_id()
        self.at, self.drawn = (0, 1), -REDRAWN

    def __call__(self, done: int, total: int, picture: Preview | None = None) -> None:
        """Tell the work done so far, all there is to do, and maybe a picture. Raises if Cancel was pressed."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.at = done, total
        self.bar.update_absolute(done, total, picture)
        time_left = self.clock.told(done, total, time.monotonic())
        if self.node is not None and time_left is not None:
            _timed.add(self.node)
            show(self.node, " ".join(filter(None, [_told.get(self.node), time_left])))

    def chart(self, draw: Callable[..., np.ndarray], *found: Any) -> None:
        """Show draw(*found), H x W x 3, uint8, unless another was shown just now. It stays until the next picture."""
        if time.monotonic() - self.drawn >= REDRAWN:
            picture = draw(*found)
            self.drawn = time.monotonic()
            self(*self.at, ("JPEG", Image.fromarray(picture), max(picture.shape[:2])))


class TwiceShown:
    """What a sampler shows of a run that is drawn twice: one bar for both, and what it draws beside the first time.

    callback: as the sampler was given it (step, denoised latents, noisy ones, steps), or None.
    """

    def __init__(self, model: ModelPatcher, callback: Callable | None) -> None:
        self.callback, self.plain = callback, {}
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def first(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        if self.previewer and not x0.is_nested:
            self.plain[step] = x0[:1].clone()  # the picture that a preview shows
        if self.callback:
            self.callback(step, x0, x, 2 * total)

    def second(self, step: int, x0: Tensor, x: Tensor, total: int) -> None:
        if self.callback:
            self.callback(total + step, x0, x, 2 * total)
        if step in self.plain:
            both = torch.cat([self.plain[step], x0[:1]], dim=-1)
            picture = self.previewer.decode_latent_to_preview_image("JPEG", both)
            comfy.utils.ProgressBar(2 * total).update_absolute(total + step + 1, 2 * total, picture)


def progress_bar(total: int) -> Callable[[int], None]:
    """A function to call with the work done so far, where there is nothing else to show."""
    view = LiveView()
    return lambda done: view(done, total)


def to_image(picture: np.ndarray) -> Tensor:
    """A picture (H x W x 3, uint8) as an IMAGE (1 x H x W x 3 in [0, 1])."""
    return torch.from_numpy(picture).float().div(255)[None]


def drawn(cls: type[io.ComfyNode], image: Tensor, *outputs: Any, **more: str | tuple) -> io.NodeOutput:
    """Outputs of a node that also draws `image` on itself; `more` joins it in the prompt's history, a text as its only
    item.
    """
    shown = ui.PreviewImage(image, cls=cls).as_dict()
    told = {name: (value,) if isinstance(value, str) else value for name, value in more.items()}
    return io.NodeOutput(*outputs, ui=shown | told)


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
