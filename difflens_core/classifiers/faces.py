"""Finding and cutting out faces with YuNet, the network of kornia's face detector, from a file that the user gives.

kornia's own FaceDetector is not used: it downloads weights when it is made, and whether it turns RGB into BGR depends
on its version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError, finite, read_tensors, reading, refuse_whole_numbers

# YuNet's boxes at strides 8, 16, 32 and 64: sides in pixels, and the scales of what the network tells about them.
SIDES = ((10, 16, 24), (32, 48), (64, 96), (128, 192, 256))
VARIANCE = (0.1, 0.2)
LONGEST = 320  # side that pictures are resized to; the largest box is 256
SURE = 0.6  # least score of a face
MARGIN = 0.25  # of the box, added on every side, as FairFace's training pictures have it

BUST, BELOW = 2.2, 0.09  # side of head and shoulders beside a face, and how far its centre lies below the face's

Faces = list[Tensor]  # of every picture F x 4: left, top, right, bottom as shares of the picture
FaceFinder = Callable[[Tensor], Faces]  # of pictures B x 3 x H x W in [0, 1]


class YuNetFinder(nn.Module):
    """The faces that YuNet is sure of (Wu, Peng and Yu 2023). Boxes may overlap."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Faces:
        scale = LONGEST / max(x.shape[-2:])
        height, width = (max(64, round(side * scale)) for side in x.shape[-2:])
        x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)
        told = self.network(x.flip(1) * 255)  # BGR, 0 to 255
        score = (told["conf"][..., 1] * told["iou"][..., 0].clamp(0, 1)).sqrt()
        boxes = decode(told["loc"][..., :4], priors(height, width).to(x))
        return [boxes[i][score[i] > SURE] for i in range(len(x))]


def priors(height: int, width: int) -> Tensor:
    """Centre and size (P x 4: x, y, width, height, as shares) of every box for pictures of that size in pixels."""
    rows = []
    h, w = (((side + 1) // 2) // 2 // 2 for side in (height, width))
    for stride, sides in zip((8, 16, 32, 64), SIDES, strict=True):
        y, x, side = torch.meshgrid(torch.arange(h), torch.arange(w), torch.tensor(sides), indexing="ij")
        across, down = (x + 0.5) * stride / width, (y + 0.5) * stride / height
        rows.append(torch.stack([across, down, side / width, side / height], dim=-1).flatten(0, 2))
        h, w = h // 2, w // 2
    return torch.cat(rows)


def decode(location: Tensor, priors: Tensor) -> Tensor:
    """Boxes (B x P x 4: left, top, right, bottom) from the network's location of each prior (B x P x 4)."""
    centre = priors[:, :2] + location[..., :2] * VARIANCE[0] * priors[:, 2:]
    half = priors[:, 2:] * (location[..., 2:] * VARIANCE[1]).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def largest_faces(faces: Faces) -> Tensor:
    """The largest face of every picture (B x 4), NaN where there is none."""
    found = torch.full((len(faces), 4), torch.nan)
    for i, boxes in enumerate(faces):
        if len(boxes):
            area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
            found[i] = boxes[area.argmax()]
    return found


def around_faces(boxes: Tensor, height_by_width: float) -> Tensor:
    """Squares of head and shoulders (B x 4) around the boxes of faces (B x 4), as shares of pictures of that shape."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, BUST * (boxes[:, 3:] - boxes[:, 1:2])
    half = side * torch.tensor([height_by_width, 1.0]) / 2
    centre = centre + side * torch.tensor([0.0, BELOW])
    return torch.cat([centre - half, centre + half], dim=1)


def cut_out(x: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Squares around `boxes` (B x 4) with a margin, as far as the picture goes, resized (B x 3 x size x size).

    Of a picture whose box is NaN all is taken. Faces are not turned upright.
    """
    height, width = x.shape[-2:]
    cut = []
    for picture, (left, top, right, bottom) in zip(x, boxes.tolist(), strict=True):
        if not math.isnan(left):
            half = max((right - left) * width, (bottom - top) * height) * (0.5 + MARGIN)
            across, down = (left + right) / 2 * width, (top + bottom) / 2 * height
            rows = slice(max(0, round(down - half)), max(1, round(down + half)))
            columns = slice(max(0, round(across - half)), max(1, round(across + half)))
            part = picture[:, rows, columns]
            picture = part if part.numel() else picture
        cut.append(F.interpolate(picture[None], (size, size), mode="bilinear", antialias=True))
    return torch.cat(cut)


def load_face_finder(path: str | Path) -> YuNetFinder:
    """YuNet from kornia's weights (yunet_final.pth, or the same as safetensors)."""
    path = Path(path)
    try:
        from kornia.contrib.face_detection import YuNet
    except ImportError as error:
        raise DiffLensError(f"{path.name}: finding faces needs kornia, which does not load ({error}).") from error
    network, weights = YuNet("test", pretrained=False), read_tensors(path)
    with reading(path):
        weights = finite(weights)
        refuse_whole_numbers(weights, ("num_batches_tracked",))
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise DiffLensError(
                "these are not the weights of kornia's face detector YuNet (yunet_final.pth)."
            ) from error
    return YuNetFinder(network).eval().requires_grad_(False)
