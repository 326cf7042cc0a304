"""Data that are sparse by construction, for the tests of losses and of training; lets them import what lies here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from difflens_core.activations import Activations

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="module")
def sparse(toys) -> Activations:
    """2 steps x 48 pictures x 16 channels x 4 x 4: sums of 3 out of 24 directions at every position."""
    draw = toys.random(0)
    directions = F.normalize(draw(24, 16), dim=1)
    chosen = draw(2, 48, 16, 24).topk(3, dim=-1).indices
    amounts = 1 + draw(2, 48, 16, 3).abs()
    rows = torch.einsum("sbpk,sbpkc->sbcp", amounts, directions[chosen])
    return Activations(rows.reshape(2, 48, 16, 4, 4), torch.tensor([0.0, 0.5]), "middle")
