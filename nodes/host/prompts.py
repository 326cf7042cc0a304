"""Several prompts in one conditioning: a row each, which the pictures of a batch get in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...difflens_core.files import DiffLensError

CHUNK = 77  # tokens that a CLIP reads at once; more of them are further such chunks


def encode_prompts(clip: comfy.sd.CLIP, prompts: Sequence[str]) -> list:
    """A CONDITIONING with a row for each prompt, encoded as CLIP Text Encode does.

    Prompts of fewer chunks are repeated, which changes nothing to networks that attend to the text. Raises
    `DiffLensError` where that cannot be done.
    """
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
    if any(len(of) != 1 for of in encoded):
        raise DiffLensError("the CLIP has a schedule of its own, so prompts cannot be put together. Take it out.")
    texts, told = ([of[0][i] for of in encoded] for i in (0, 1))
    lengths = [text.shape[1] for text in texts]
    longest = math.lcm(*lengths)
    if len({*lengths}) > 1 and (any(length % CHUNK for length in lengths) or longest > 4 * min(lengths)):
        line = prompts[lengths.index(max(lengths))]
        raise DiffLensError(
            f"the prompts are {min(lengths)} to {max(lengths)} tokens long, and cannot be put together. Shorten the "
            f"longest: {line[:60]!r}."
        )
    together = torch.cat([text.repeat(1, longest // text.shape[1], 1) for text in texts])
    more = {name: joined([of[name] for of in told], name) for name in told[0]}
    return [[together, more]]


def joined(values: list[Any], name: str) -> Any:
    """What the prompts are told beside their text: tensors as rows, all else as it is."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(value != values[0] for value in values):
        raise DiffLensError(f"the prompts differ in {name}, and cannot be put together.")
    return values[0]


def of_pictures(conditioning: list, images: Tensor) -> list:
    """The conditioning for pictures `images` (B, their numbers in a run): of n prompts picture i gets number i % n."""

    def rows(value: Any, count: int) -> Any:
        mine = isinstance(value, Tensor) and value.ndim > 1 and len(value) == count
        return value[(images % count).to(value.device)] if mine else value

    return [
        [rows(text, len(text)), {name: rows(value, len(text)) for name, value in more.items()}] if len(text) > 1
        else [text, more]
        for text, more in conditioning
    ]  # fmt: skip
