"""What an edit changed in pictures that are paired by seed, beside the class that it was to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError
from .fairness import pixel_change
from .intervals import wilson_interval

if TYPE_CHECKING:
    from torchmetrics import Metric

BATCH = 4  # DISTS takes about 1 GB of memory for a picture of 1024 x 1024
PERCEPTUAL = ("LPIPS", "DISTS")
ENOUGH_FOR_KID = 100  # pictures; with fewer, chance moves it more than most edits do
KID_SUBSET = 1000  # pictures that are compared with one another at a time, as is usual


def measure_changes(
    before: Tensor,
    after: Tensor,
    networks: Mapping[str, nn.Module] | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """What changed in the pictures themselves, each a mean over the pictures.

    before, after: n x H x W x 3 or more, in [0, 1], paired by seed. changed: share of pictures of which any pixel
    differs in 8 bits, as pictures are saved, with Wilson's interval in changed_ci; rmse: `pixel_change`; ssim:
    structural similarity, 1 for equal pictures (Wang et al. 2004: a Gaussian window of 11 pixels, by channel); and the
    distance by each of `networks`, under its name. `report` is told of the pictures done.
    """
    sums: dict[str, float] = {}
    done = 0
    for a, b in pairs_of(before, after):
        found = {
            "changed": (to_bytes(a) != to_bytes(b)).flatten(1).any(dim=1),
            "rmse": torch.full((len(a),), pixel_change(a.numpy(), b.numpy())),
            "ssim": structural_similarity(a, b),
            **{name: perceptual_distance(network, a, b) for name, network in (networks or {}).items()},
        }
        sums = {name: sums.get(name, 0.0) + float(values.double().sum()) for name, values in found.items()}
        done += len(a)
        report(done)
    low, high = wilson_interval(sums["changed"], done)
    return {name: total / done for name, total in sums.items()} | {"changed_ci": (float(low), float(high))}


def pairs_of(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures' red, green and blue, in batches, on the CPU: a host may keep them on another device."""
    for a, b in zip(before[..., :3].split(BATCH), after[..., :3].split(BATCH), strict=True):
        yield a.cpu(), b.cpu()


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in 8 bits: 0 to 255."""
    return (images.clamp(0, 1) * 255).round()


def structural_similarity(before: Tensor, after: Tensor) -> Tensor:
    """SSIM (n) of pictures n x H x W x 3 of at least 11 x 11 pixels."""
    from kornia.metrics import ssim  # here, because it takes long to load

    a, b = (images.movedim(-1, 1).float() for images in (before, after))
    return ssim(a, b, window_size=11, padding="valid").flatten(1).mean(dim=1)


# --- distances by networks that are trained to see as people do ---


def perceptual_network(name: str) -> nn.Module:
    """LPIPS (Zhang et al. 2018, on AlexNet) or DISTS (Ding et al. 2020, on VGG-16); 0 for equal pictures.

    Called with two batches (n x 3 x H x W in [0, 1]) it gives n distances. torchvision downloads the network's weights
    once, into torch's cache. Raises `DiffLensError` if torchmetrics is missing or the weights cannot be had.
    """
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"LPIPS": AlexNet_Weights, "DISTS": VGG16_Weights}[name].DEFAULT
    try:
        if name == "LPIPS":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            return LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
        from torchmetrics.functional.image.dists import DISTSNetwork

        return DISTSNetwork().eval()
    except ImportError as error:
        raise no_torchmetrics(name) from error
    except OSError as error:
        raise DiffLensError(
            f"{name}: its network's weights could not be downloaded. Put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints."
        ) from error


def no_torchmetrics(name: str) -> DiffLensError:
    return DiffLensError(
        f"{name} is computed by torchmetrics 1.8 or newer, which is not installed. Install it into ComfyUI's Python: "
        "pip install torchmetrics."
    )


@torch.inference_mode()
def perceptual_distance(network: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """Distances (n, on the CPU) by `perceptual_network` of pictures n x H x W x 3 in [0, 1]."""
    device = next(network.parameters()).device
    a, b = (images.movedim(-1, 1).float().clamp(0, 1).to(device) for images in (before, after))
    return network(a, b).reshape(-1).cpu()


# --- distances of features ---


def clip_similarity(before: Tensor, after: Tensor) -> float:
    """CLIP-I: mean of (cos + 1) / 2 of the CLIP features (n x d) of pictures paired by seed; 1 for equal pictures."""
    return float((F.cosine_similarity(before.cpu().double(), after.cpu().double(), dim=1) + 1).mean() / 2)


def feature_changes(before: Tensor, after: Tensor) -> tuple[dict[str, float], list[str]]:
    """CLIP-I, FID and KID of CLIP features (n x d each) of pictures paired by seed, and why any is left out."""
    found, reasons = {"clip_i": clip_similarity(before, after)}, []
    for name, measure in (("fid_clip", frechet_distance), ("kid_clip", kernel_distance)):
        try:
            found[name] = measure(before, after)
        except DiffLensError as error:
            reasons.append(str(error))
    return found, reasons


def frechet_distance(before: Tensor, after: Tensor) -> float:
    """Frechet distance of features (n x d each), as FID has it (Heusel et al. 2017). By torchmetrics.

    It is biased upwards by an amount that depends on n, so compare only figures of equally many pictures. Raises
    `DiffLensError` for d pictures or fewer: their covariance is singular.
    """
    n, width = before.shape
    if n <= width:
        raise DiffLensError(f"FID needs more pictures than features, {width + 1} or more; there are {n}.")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise no_torchmetrics("FID") from error
    return float(fed(FrechetInceptionDistance(AsTheyAre(width)), before, after))


def kernel_distance(before: Tensor, after: Tensor) -> float:
    """Unbiased kernel distance of features (n x d each), as KID has it (Binkowski et al. 2018). By torchmetrics.

    Near 0, and as often below as above it, where nothing but chance differs. Its formula asks for independent
    pictures, which those of one seed are not: the even ones before meet the odd ones after. Raises `DiffLensError` for
    fewer than `ENOUGH_FOR_KID` pictures.
    """
    if len(before) < ENOUGH_FOR_KID:
        raise DiffLensError(f"KID needs {ENOUGH_FOR_KID} pictures or more; there are {len(before)}.")
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise no_torchmetrics("KID") from error
    half = len(before) // 2
    size = min(half, KID_SUBSET)
    metric = KernelInceptionDistance(AsTheyAre(before.shape[1]), subsets=-(-half // size), subset_size=size)
    with torch.random.fork_rng(devices=[]):  # the subsets are drawn from torch's global generator
        torch.manual_seed(0)
        return float(fed(metric, before[0 : 2 * half : 2], after[1 : 2 * half : 2])[0])


class AsTheyAre(nn.Module):
    """The feature extractor of torchmetrics for what are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fed(metric: Metric, before: Tensor, after: Tensor) -> Any:
    """What a metric of torchmetrics computes of features, in float64."""
    metric.update(before.cpu().double(), real=True)
    metric.update(after.cpu().double(), real=False)
    return metric.compute()
