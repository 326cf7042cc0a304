"""What an edit changed, against formulas written out in float64."""

from __future__ import annotations

import sys
import urllib.request

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import gaussian_filter

from difflens_core.files import DiffLensError
from difflens_core.measure import changes, feature_changes, measure_changes, perceptual_network
from difflens_core.measure.changes import clip_similarity, frechet_distance, kernel_distance, perceptual_distance


def pictures(n: int, seed: int = 0, size: int = 24) -> torch.Tensor:
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(seed))


def features(n: int, width: int, shift: float, seed: int) -> torch.Tensor:
    draw = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return draw * torch.linspace(0.5, 2, width) + shift


def ssim_by_filters(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, where the window of 11 pixels fits; one channel."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    c1, c2 = 0.01**2, 0.03**2
    var_a, var_b, both = mean(a * a) - mean(a) ** 2, mean(b * b) - mean(b) ** 2, mean(a * b) - mean(a) * mean(b)
    luminance = (2 * mean(a) * mean(b) + c1) / (mean(a) ** 2 + mean(b) ** 2 + c1)
    return float((luminance * (2 * both + c2) / (var_a + var_b + c2)).mean())


def test_changes_of_pictures_are_those_of_the_formulas():
    before, noise = pictures(19), pictures(19, seed=1)
    after = before.clone()
    after[5:] = 0.7 * before[5:] + 0.3 * noise[5:]
    told = []
    found = measure_changes(before, after, report=told.append)
    a, b = before.double().numpy(), after.double().numpy()
    ssim = [ssim_by_filters(a[i, ..., c], b[i, ..., c]) for i in range(19) for c in range(3)]
    assert found["ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)
    assert found["rmse"] == pytest.approx(np.mean([np.sqrt(((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]))
    assert found["changed"] == pytest.approx(14 / 19) and told == [4, 8, 12, 16, 19]
    assert found["changed_ci"][0] < 14 / 19 < found["changed_ci"][1]


class OnDevice(torch.Tensor):
    """A tensor that is not on the CPU, as far as numpy is asked for it."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_pictures_may_lie_on_another_device():
    before, after = pictures(5), pictures(5, seed=1)
    there = [images.as_subclass(OnDevice) for images in (before, after)]
    assert measure_changes(*there) == measure_changes(before, after)


def test_equal_pictures_did_not_change():
    found = measure_changes(pictures(3), pictures(3))
    low, high = found.pop("changed_ci")
    assert found == {"changed": 0, "rmse": 0, "ssim": pytest.approx(1)}
    assert low == 0 and 0.3 < high < 0.7, "three pictures tell little"


def test_what_no_saved_picture_shows_is_no_change():
    before = torch.full((2, 16, 16, 3), 102 / 255)
    assert measure_changes(before, before + 1e-5)["changed"] == 0
    after = before.clone()
    after[1, 3, 4, 2] += 1 / 255
    assert measure_changes(before, after)["changed"] == 0.5


def test_a_distance_by_a_network_is_the_mean_of_its_distances():
    class Brightness(torch.nn.Linear):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape[1] == 3 and a.min() >= 0 and b.max() <= 1
            return (a - b).abs().mean(dim=(1, 2, 3))

    before, after = pictures(17) * 2 - 0.5, pictures(17, seed=1)
    found = measure_changes(before, after, {"LPIPS": Brightness(1, 1)})["LPIPS"]
    assert found == pytest.approx(float((before.clamp(0, 1) - after).abs().mean()), rel=1e-5)


def test_clip_similarity_of_known_angles():
    axes = torch.eye(4)
    assert clip_similarity(axes, 3 * axes) == pytest.approx(1)
    assert clip_similarity(axes, -axes) == pytest.approx(0)
    assert clip_similarity(axes, axes.roll(1, 0)) == pytest.approx(0.5)


def test_frechet_distance_is_that_of_two_gaussians():
    pytest.importorskip("torchmetrics")
    a, b = features(90, 6, 0.0, 1), features(90, 6, 0.4, 2)
    x, y = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DiffLensError, match="FID needs .* 7 or more; there are 6"):
        frechet_distance(a[:6], b[:6])


def mmd_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Binkowski et al. 2018, eq. 4 with the kernel (x.y / d + 1)^3."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j)
    return within / (n * (n - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kernel_distance_is_that_of_independent_halves():
    pytest.importorskip("torchmetrics")
    a, b = features(101, 4, 0.0, 1), features(101, 4, 0.4, 2)
    expected = mmd_by_loops(a[0:100:2].double().numpy(), b[1:100:2].double().numpy())
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DiffLensError, match="KID needs 100 pictures or more; there are 99"):
        kernel_distance(a[:99], b[:99])


def test_kernel_distance_of_an_edit_that_did_nothing_is_nothing_on_average():
    """Also where before and after are the same pictures, as a pair of one seed nearly is."""
    pytest.importorskip("torchmetrics")
    found = [kernel_distance(same, same) for same in (features(100, 4, 0.0, seed) for seed in range(60))]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(60)


def test_kernel_distance_of_many_pictures_is_drawn_alike_every_time(monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(changes, "KID_SUBSET", 40)
    a, b = features(240, 4, 0.0, 1), features(240, 4, 0.4, 2)
    state = torch.get_rng_state()
    first = kernel_distance(a, b)
    torch.rand(3)
    assert kernel_distance(a, b) == first != 0
    torch.set_rng_state(state)
    kernel_distance(a, b)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left as it was"


def test_what_needs_more_pictures_is_left_out_with_a_reason():
    pytest.importorskip("torchmetrics")
    many, few = features(120, 4, 0.0, 1), features(3, 4, 0.0, 1)
    found, reasons = feature_changes(many, many + 0.1)
    assert found.keys() == {"clip_i", "fid_clip", "kid_clip"} and not reasons
    found, reasons = feature_changes(few, few)
    assert found == {"clip_i": pytest.approx(1)}
    assert [reason[:9] for reason in reasons] == ["FID needs", "KID needs"]


@pytest.fixture
def random_backbones(monkeypatch):
    """torchvision's networks with random weights: the true ones are a download."""
    pytest.importorskip("torchmetrics")
    import torchmetrics.functional.image.dists as dists
    import torchvision.models

    torch.manual_seed(0)
    alexnet, vgg = torchvision.models.alexnet, torchvision.models.vgg16
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: alexnet(weights=None))
    monkeypatch.setattr(dists, "vgg16", lambda weights: vgg(weights=None))


@pytest.mark.parametrize("name", changes.PERCEPTUAL)
def test_perceptual_distances_grow_with_the_change(random_backbones, name):
    network = perceptual_network(name)
    before, noise = pictures(2, size=64), pictures(2, seed=1, size=64)
    same, little, much = (perceptual_distance(network, before, before.lerp(noise, by)) for by in (0, 0.1, 0.9))
    assert same.shape == (2,) and same.abs().max() < 1e-5
    assert (little > 1e-6).all() and (much > little).all()
    assert perceptual_distance(network, before[:1], noise[:1]).shape == (1,)


@pytest.mark.parametrize("name", changes.PERCEPTUAL)
def test_missing_weights_are_named(monkeypatch, tmp_path, name):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args: object, **kwargs: object):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(DiffLensError, match=rf"{name}: .* Put https://.*\.pth into .*checkpoints\.$"):
        perceptual_network(name)


def test_a_missing_package_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"] or ["torchmetrics"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    many = features(101, 4, 0.0, 1)
    for measure in (lambda: perceptual_network("LPIPS"), lambda: perceptual_network("DISTS"),
                    lambda: frechet_distance(many, many), lambda: kernel_distance(many, many)):  # fmt: skip
        with pytest.raises(DiffLensError, match="torchmetrics 1.8 or newer, which is not installed.*pip install"):
            measure()
