"""Frames: what lies where in them, and back."""

from __future__ import annotations

import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.activations.frames import GRID, FramedActivations, into_frames, out_of_frames


def ramp(height: int, width: int) -> torch.Tensor:
    """A map that tells where one is: 1 x 2 x H x W, x and y of every position's centre as shares."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y])[None]


@pytest.mark.parametrize("size", [(8, 8), (12, 16), (16, 12), (24, 24)])
def test_a_cell_of_the_frame_is_where_it_says(size):
    frame = torch.tensor([[0.2, 0.3, 0.7, 0.9]])
    inside = into_frames(ramp(*size), frame)[0]
    cells = (torch.arange(GRID) + 0.5) / GRID
    assert torch.allclose(inside[0], (0.2 + 0.5 * cells).expand(GRID, GRID), atol=1e-5)
    assert torch.allclose(inside[1], (0.3 + 0.6 * cells)[:, None].expand(GRID, GRID), atol=1e-5)


def test_the_whole_picture_as_its_own_frame_is_left_as_it_is():
    maps, whole = torch.randn(3, 5, GRID, GRID), torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    torch.testing.assert_close(into_frames(maps, whole), maps)
    torch.testing.assert_close(out_of_frames(maps, whole, (GRID, GRID)), maps)


def test_laid_back_it_is_where_it_was_and_nothing_outside():
    frame, size = torch.tensor([[0.25, 0.125, 0.75, 0.625]]), (16, 16)  # 8 x 8 positions, as many as cells
    maps = torch.randn(1, 3, GRID, GRID)
    back = out_of_frames(maps, frame, size)
    torch.testing.assert_close(back[:, :, 2:10, 4:12], maps)
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[1:11, 3:13] = False
    assert not back[..., outside].any()
    beyond = out_of_frames(maps, torch.tensor([[-0.25, 0.0, 0.25, 0.5]]), size)  # half of it left of the picture
    torch.testing.assert_close(beyond[:, :, :8, :4], maps[..., 4:])


def test_framed_activations_are_the_frames_of_the_captured_ones():
    values, frames = torch.randn(2, 5, 6, 8, 12), torch.rand(5, 4) * 0.4 + torch.tensor([0.0, 0.0, 0.5, 0.5])
    plain = Activations((values[:, :3], values[:, 3:]), torch.tensor([0.0, 0.5]), "middle_block")
    framed = FramedActivations.of(plain, frames)
    assert framed.map == (GRID, GRID) and framed.positions == GRID**2 and framed.pictures == 5
    for step in range(2):
        expected = into_frames(values[step], frames)
        torch.testing.assert_close(torch.cat([part for _, part in framed.batches(step, 128)]), expected)
        torch.testing.assert_close(framed.values[step], expected)
        torch.testing.assert_close(framed.part(1, 4).values[step], expected[1:4])
