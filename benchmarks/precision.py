"""The number format that the small models sample and train in: bf16 where the processor computes in it, else fp32.

A processor without bf16 of its own emulates it, which takes four to six times as long as fp32.
"""

from __future__ import annotations

import torch

from difflens_core.networks import Denoiser

_HAS = torch.cpu.get_capabilities()
# What the processor has, and what torch and oneDNN take of it (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA).
FAST_BF16 = (
    (_HAS.get("avx512_bf16", False) or _HAS.get("amx_bf16", False))
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
PRECISION = "bf16" if FAST_BF16 else "fp32"


def at_precision(model: Denoiser) -> Denoiser:
    """The model with weights of that precision, as hosts run it: pictures go in and come out in fp32."""
    if not FAST_BF16:
        return model
    model = model.bfloat16().to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(lambda module, given: tuple(x if x is None else x.bfloat16() for x in given))
    model.register_forward_hook(lambda module, given, x0: x0.float())
    return model


def autocast() -> torch.autocast:
    """Where weights stay in fp32, as in training: products of that precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16)
