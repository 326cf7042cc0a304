"""Finding faces: our decoding against kornia's own, cutting out against hand-made boxes. The weights are random."""

from __future__ import annotations

import pytest
import torch

from difflens_core.classifiers import load_face_finder
from difflens_core.classifiers.faces import (
    BUST,
    LONGEST,
    YuNetFinder,
    around_faces,
    cut_out,
    decode,
    largest_faces,
    priors,
)
from difflens_core.files import DiffLensError

NAN = float("nan")


def told(height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a network might tell of one picture of that size: random numbers, few of them sure."""
    draw = torch.Generator().manual_seed(seed)
    count = len(priors(height, width))
    shapes = {"loc": (1, count, 14), "conf": (1, count, 2), "iou": (1, count, 1)}
    random = {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    return {"loc": random["loc"] * 4 - 2, "conf": random["conf"], "iou": random["iou"]}


class Says(torch.nn.Module):
    """Stands for YuNet and keeps what it was shown."""

    def __init__(self, answer: dict[str, torch.Tensor]):
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.shown = x
        return self.answer


def test_the_sure_boxes_are_those_of_kornias_detector(monkeypatch):
    detection = pytest.importorskip("kornia.contrib.face_detection")
    monkeypatch.setattr(detection, "YuNet", lambda phase, pretrained: torch.nn.Identity())  # it would download
    theirs = detection.FaceDetector(confidence_threshold=0.6, keep_top_k=5000)
    theirs.nms = lambda boxes, scores, threshold: torch.arange(len(boxes))  # we need no single boxes
    answer = told(LONGEST, 160)
    expected = theirs.postprocess(answer, LONGEST, 160)[0][:, :4] / torch.tensor([160, LONGEST, 160, LONGEST])
    (found,) = YuNetFinder(Says(answer))(torch.rand(1, 3, LONGEST, 160))
    assert 50 < len(found) < len(answer["loc"][0])
    order = lambda boxes: boxes[boxes[:, 0].argsort()]  # noqa: E731
    torch.testing.assert_close(order(found), order(expected), atol=1e-5, rtol=1e-4)


def test_the_network_is_shown_bgr_from_0_to_255_at_its_size():
    network = Says(told(LONGEST, 160))
    picture = torch.tensor([0.2, 0.4, 0.6]).reshape(1, 3, 1, 1).expand(1, 3, 64, 32)
    YuNetFinder(network)(picture)
    assert network.shown.shape == (1, 3, LONGEST, 160)
    torch.testing.assert_close(network.shown[0, :, 7, 9], torch.tensor([0.6, 0.4, 0.2]) * 255)


def test_boxes_are_where_the_network_puts_them():
    place = priors(64, 64)
    assert len(place) == 8 * 8 * 3 + 4 * 4 * 2 + 2 * 2 * 2 + 3
    torch.testing.assert_close(place[0], torch.tensor([4, 4, 10, 10]) / 64)
    location = torch.tensor([[[0.0, 0, 0, 0], [10, -10, 0, 0]]])
    found = decode(location, torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4]]))
    torch.testing.assert_close(found[0], torch.tensor([[0.4, 0.3, 0.6, 0.7], [0.6, -0.1, 0.8, 0.3]]))


def test_the_largest_face_is_chosen():
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 0.3, 0.3]])
    found = largest_faces([boxes, boxes[:0]])
    assert torch.equal(found[0], boxes[1]) and found[1].isnan().all()


def test_a_face_is_cut_out_as_a_square_with_a_margin():
    rows = torch.arange(80.0)[:, None].expand(80, 100)
    columns = torch.arange(100.0).expand(80, 100)
    picture = torch.stack([rows, columns, rows])[None].repeat(3, 1, 1, 1)
    # 20 wide and 16 high around column 40, row 40: 30 x 30 pixels; at the corner what there is; all without a face
    boxes = torch.tensor([[0.3, 0.4, 0.5, 0.6], [-0.1, -0.1, 0.1, 0.1], [NAN] * 4])
    found = cut_out(picture, boxes, 30)
    assert torch.equal(found[0], picture[0, :, 25:55, 25:55])
    assert found[1, 0].max() <= 14 and found[1, 1].max() <= 14
    assert found[2, 0].max() > 77 and found[2, 1].max() > 96


def test_kornias_network_runs_on_random_weights_from_a_file(tmp_path):
    detection = pytest.importorskip("kornia.contrib.face_detection")
    torch.manual_seed(0)
    path = tmp_path / "yunet.pth"
    torch.save(detection.YuNet("train", pretrained=False).state_dict(), path)
    found = load_face_finder(path)(torch.rand(2, 3, 96, 64))
    assert len(found) == 2 and all(boxes.ndim == 2 and boxes.shape[1] == 4 for boxes in found)
    weights = torch.load(path)
    torch.save({n: t.to(torch.float8_e5m2) if t.is_floating_point() else t for n, t in weights.items()}, path)
    load_face_finder(path)
    torch.save({name: tensor.to(torch.int8) for name, tensor in weights.items()}, path)
    with pytest.raises(DiffLensError, match="yunet.pth: tensor .* holds whole numbers"):
        load_face_finder(path)
    torch.save({"fc.weight": torch.ones(2)}, path)
    with pytest.raises(DiffLensError, match="not the weights of kornia's face detector"):
        load_face_finder(path)


def test_head_and_shoulders_are_a_square_around_the_face():
    boxes = torch.tensor([[0.4, 0.2, 0.6, 0.5], [NAN] * 4])
    left, top, right, bottom = around_faces(boxes, 64 / 96)[0].tolist()
    assert (bottom - top) * 64 == pytest.approx((right - left) * 96) and bottom - top == pytest.approx(BUST * 0.3)
    assert (left + right) / 2 == pytest.approx(0.5) and top < 0.2 and bottom > 0.7
    assert around_faces(boxes, 1.0)[1].isnan().all()
