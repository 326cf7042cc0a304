"""Reading and changing what a module of the denoiser puts out.

A site is a module's name and what is read there: "middle_block.1" is the module's output, "middle_block.1 update" what
it adds to its input (output minus input). The one string names it in captures, SAEs, recipes and nodes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..files import DiffLensError

UPDATE = " update"  # ends the name of a site that is what a module adds to its input


def reads_update(site: str) -> bool:
    """Whether the site is a module's update (output minus input) rather than its output."""
    return site.endswith(UPDATE)


def find_site(model: nn.Module, site: str) -> nn.Module:
    """The submodule of a site. Raises `DiffLensError` that names the model and some of its modules if it is absent."""
    try:
        return model.get_submodule(site.removesuffix(UPDATE))
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise DiffLensError(
            f"{type(model).__name__} has no module {site.removesuffix(UPDATE)}. It has: {known}."
        ) from None


def to_map(h: Any, grid: tuple[int, int] | None = None) -> Any:
    """Tokens B x T x C as a map B x C x H x W on `grid` (T = H W), or B x C x T x 1 without one; all else as it is."""
    if not isinstance(h, Tensor) or h.ndim != 3:
        return h
    return h.transpose(1, 2).unflatten(2, grid or (h.shape[1], 1))


def from_map(h: Tensor, ndim: int) -> Tensor:
    """The inverse of `to_map` for what had `ndim` dimensions."""
    return h.flatten(2).transpose(1, 2) if ndim == 3 else h


def only(output: Any) -> Any:
    """What a module puts out, also out of a tuple of one, in which U-Nets of diffusers get it from their attentions."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


class Whole:
    """The part of a module's input and output that a site is: the first input, and all of an output that is a tensor.

    Networks with several streams need another one with these methods, see `edit_site`.
    """

    def given(self, args: tuple, kwargs: dict) -> Tensor:
        """What goes in, as a map."""
        return to_map(next(iter((*args, *kwargs.values()))))

    def read(self, output: Any, kwargs: dict) -> Tensor:
        """What comes out, as a map."""
        return to_map(only(output))

    def write(self, output: Any, kwargs: dict, h: Tensor) -> Any:
        """The output with h in place of what `read` gave."""
        written = from_map(h, only(output).ndim)
        return (written,) if isinstance(output, tuple) else written


@contextmanager
def edit_site(
    model: nn.Module, site: str, edit: Callable[[Tensor], Tensor], part: Whole | None = None
) -> Iterator[None]:
    """While open, what is read at `site` is replaced by `edit(h)`. Leaves no hook behind.

    h is the module's output, or, if the site's name ends in " update", output minus input: what the edit changes of
    that is added to the output. Tokens are shown as maps (`to_map`). An edit that gives h back changes nothing.
    `part` tells which part of a block of several streams the site is. Raises `DiffLensError` while the module runs if
    that is no tensor, or has no update.
    """
    module, part, given = find_site(model, site), part or Whole(), []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.append(part.given(args, kwargs).clone())  # some blocks write into their input

    def update(whole: Tensor) -> Tensor:
        was = given.pop()
        if was.shape != whole.shape:
            shapes = [" x ".join(map(str, tensor.shape)) for tensor in (was, whole)]
            raise DiffLensError(
                f"{site}: this module makes {shapes[1]} out of {shapes[0]}, so it has no update. Use its output: "
                f"{site.removesuffix(UPDATE)}."
            )
        return whole - was

    def after(_module: nn.Module, _args: tuple, kwargs: dict, output: Any) -> Any:
        whole = part.read(output, kwargs)
        if not isinstance(whole, Tensor):
            raise DiffLensError(f"{site} puts out a {type(whole).__name__}, expected a tensor. Use a module inside it.")
        h = update(whole) if reads_update(site) else whole
        edited = edit(h)
        if edited is h:
            return None
        return part.write(output, kwargs, whole + (edited - h) if reads_update(site) else edited)

    handles = [module.register_forward_hook(after, with_kwargs=True)]
    if reads_update(site):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
