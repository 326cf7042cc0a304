"""The precision of benchmarks and training: fp32 where bf16 would be emulated, and pictures in fp32 either way."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import precision  # noqa: E402

from difflens_core.networks import sample, start_noise  # noqa: E402


@pytest.mark.parametrize("lowered", [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_a_processor_that_is_told_to_leave_bf16_alone_computes_in_fp32(lowered):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    code = "import precision; print(precision.PRECISION, precision.autocast()._enabled)"
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ, **lowered, **paths}, capture_output=True)
    assert told.stdout.decode().split() == ["fp32", "False"]


@pytest.mark.parametrize("fast", [True, False])
def test_pictures_go_in_and_come_out_in_fp32(fast, toys, monkeypatch):
    monkeypatch.setattr(precision, "FAST_BF16", fast)
    model = toys.denoiser()
    found = precision.at_precision(copy.deepcopy(model))
    assert next(found.parameters()).dtype == (torch.bfloat16 if fast else torch.float32)
    noise = start_noise(3, 1, 16)
    pictures, exact = sample(found, noise, 3), sample(model, noise, 3)
    assert pictures.dtype == torch.float32 and torch.equal(pictures, exact) == (not fast)
    torch.testing.assert_close(pictures, exact, atol=0.05, rtol=0)
