"""What the tests of the published methods share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model(toys):
    """A toy denoiser of prompts, with a context of width 8."""
    return toys.denoiser(context_width=8)
