"""Small random SAEs, captures, probes, recipes and denoisers for the unit tests, and where they find the code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
# Only for this process: the host tests drive a server in another one, which finds the pack by itself.
sys.path[:0] = [str(ROOT), str(ROOT / "models" / "making"), str(ROOT / "scripts")]

from launch_comfyui import install_mends  # noqa: E402

install_mends()  # a torchvision built for a GPU beside a CPU build of torch: diffusers imports it

from difflens_core.activations import Activations  # noqa: E402
from difflens_core.locate import Levels, Probes  # noqa: E402
from difflens_core.networks import Adm, AdmConfig, Denoiser, DenoiserConfig  # noqa: E402
from difflens_core.sae import Normalisation, SparseAutoencoder  # noqa: E402
from difflens_core.steer import Recipe  # noqa: E402

CLASSES = ("young", "adult", "senior")


def random(seed: int):
    """A function that draws normal tensors of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def progress(steps: int) -> torch.Tensor:
    return torch.arange(steps) / steps


def normalisation(steps: int = 3, width: int = 6, seed: int = 1) -> Normalisation:
    draw = random(seed)
    return Normalisation(progress(steps), draw(steps, width), 0.5 + draw(steps).abs())


def activations(pictures: int = 12, steps: int = 3, width: int = 6, size: int = 2, seed: int = 2) -> Activations:
    draw = random(seed)
    values = draw(steps, pictures, width, size, size) * 1.5 + draw(steps, 1, width, 1, 1)
    return Activations(values, progress(steps), "middle")


def sae(latents: int = 20, k: int = 4, width: int = 6, steps: int = 3, seed: int = 3) -> SparseAutoencoder:
    draw = random(seed)
    encoder, decoder = draw(latents, width), F.normalize(draw(latents, width), dim=1)
    biases = draw(latents) * 0.3, draw(width) * 0.3
    return SparseAutoencoder(encoder, biases[0], decoder, biases[1], normalisation(steps, width), k, "middle")


def probes(scale: float = 1.0, steps: int = 3, width: int = 6, seed: int = 4) -> Probes:
    draw = random(seed)
    weight, bias = draw(steps, len(CLASSES), width) * scale, draw(steps, len(CLASSES))
    return Probes(weight, bias, progress(steps), torch.ones(steps), "age", CLASSES)


def recipe(features: int = 5, steps: int = 3, width: int = 6, positions: int = 4, seed: int = 5, **settings) -> Recipe:
    draw, k = random(seed), len(CLASSES)
    return Recipe(
        "age", CLASSES, "middle", "abc", torch.arange(features), draw(features, width), draw(features) * 0.3,
        draw(features).abs() * 0.3, F.normalize(draw(features, width), dim=1), draw(k, features) > 0,
        Levels.of(draw(steps, k, features, positions).abs().half()), draw(steps, k, width), draw(steps, k),
        normalisation(steps, width), **{"strength": (1.0, 0.5, 2.0), **settings},
    )  # fmt: skip


def levels(
    features: int = 5, steps: int = 3, width: int = 6, positions: int = 4, maps: int = 2, seed: int = 9
) -> Levels:
    """Those of `recipe`, but different by two attributes of two and three classes."""
    own, draw = recipe(features, steps, width, positions).levels, random(seed)
    attributes = {"hair": ("short", "long"), "tone": ("a", "b", "c")}
    weight, bias = draw(steps, 5, width), draw(steps, 5)
    effects, more = draw(steps, len(CLASSES), 5, maps), draw(maps, features, positions)
    none = torch.zeros(steps, len(CLASSES), 5, len(own.maps))
    classes = torch.nn.functional.pad(own.classes, (0, maps))
    maps, effects = torch.cat([own.maps, more]), torch.cat([none, effects], dim=3)
    return Levels(maps, own.places, classes, effects, weight, bias, attributes)


def denoiser(seed: int = 6, **sizes) -> Denoiser:
    """A tiny denoiser whose blocks all do something (a fresh one begins as the identity)."""
    draw = random(seed)
    model = Denoiser(DenoiserConfig(**{"size": 16, "width": 32, "outer_width": 16, "heads": 2, **sizes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(draw(*weight.shape) / max(1, weight[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False)


def adm(config: AdmConfig, seed: int = 7) -> Adm:
    """An ADM U-Net whose weights all do something (its own start has random convolutions but plain norms)."""
    draw, model = random(seed), Adm(config)
    with torch.no_grad():
        for weight in model.parameters():
            scale = max(1, weight[0].numel()) ** -0.5
            weight.copy_(draw(*weight.shape) * scale if weight.ndim > 1 else 1 + 0.3 * draw(*weight.shape))
    return model.eval().requires_grad_(False)


def unet2d(seed: int = 8, **settings):
    """A small random UNet2DModel of diffusers."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    common = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**common | types | settings).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    makers = (random, normalisation, activations, sae, probes, recipe, levels, denoiser, adm, unet2d)
    return SimpleNamespace(classes=CLASSES, **{maker.__name__: maker for maker in makers})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which every test was skipped has shown nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes, whose parent knows of all tests
        return
    if exitstatus == 0 and not session.config.option.collectonly and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
