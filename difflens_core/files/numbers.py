"""What a file's numbers must be, and how they are kept small."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .errors import DiffLensError


def finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of fp8 in fp32, because hardly anything can be computed in it.

    Raises `DiffLensError` if one holds NaN or infinite numbers, or none that can be read.
    """
    found = {}
    for name, tensor in tensors.items():
        try:
            small = tensor.is_floating_point() and tensor.element_size() == 1
            found[name] = tensor.float() if small else tensor
            single = found[name].float() if tensor.dtype == torch.float64 else found[name]  # which may not hold it
            fine = not tensor.is_floating_point() or bool(torch.isfinite(single).all())
        except (NotImplementedError, RuntimeError) as error:  # sparse, packed, or without any content
            raise DiffLensError(
                f"tensor {name} is of a kind that cannot be read here ({tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}). Save it as an ordinary tensor."
            ) from error
        if not fine:
            raise DiffLensError(f"tensor {name} holds NaN or infinite numbers. The file is damaged.")
    return found


def refuse_whole_numbers(tensors: Mapping[str, Tensor], counts: Collection[str] = ()) -> None:
    """Raise `DiffLensError` if a tensor holds whole numbers, unless the last part of its name is one of `counts`."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and name.rpartition(".")[2] not in counts:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DiffLensError(
                f"tensor {name} holds whole numbers ({kind}), so its weights are quantised in a way that is not known "
                "here. Use the file in fp32, fp16, bf16 or fp8."
            )


def as_half(tensor: Tensor) -> Tensor:
    """The tensor in fp16, or in fp32 if its numbers are too large or too small for that."""
    largest, limits = float(tensor.detach().abs().max()) if tensor.numel() else 0.0, torch.finfo(torch.float16)
    return tensor.half() if not largest or limits.smallest_normal <= largest <= limits.max else tensor.float()


UNIT = ".unit"  # what the name of the units ends with that a tensor `in_bytes` is counted in


def in_bytes(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors, those of these names in whole numbers up to 127 of a unit of each line, along their last axis."""
    stored = dict(tensors)
    for name in names & stored.keys():
        tensor = stored[name].detach().float()
        largest = tensor.abs().amax(dim=-1) if tensor.shape[-1] else tensor.new_zeros(tensor.shape[:-1])
        unit = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name], stored[name + UNIT] = (tensor / unit[..., None]).round().to(torch.int8), unit
    return stored


def out_of_bytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `in_bytes` was given, in fp32. Raises `DiffLensError` if units do not fit."""
    read = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNIT)}
    for name in tensors.keys() - read.keys():
        whole, unit = read.get(name.removesuffix(UNIT)), tensors[name]
        if whole is None or whole.dtype != torch.int8 or whole.shape[:-1] != unit.shape:
            raise DiffLensError(f"{name} does not fit what it is the unit of. The file is damaged.")
        read[name.removesuffix(UNIT)] = whole * unit.float()[..., None]
    return read
