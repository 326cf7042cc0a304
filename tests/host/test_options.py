"""ComfyUI's own options change no steered picture: how it caches, keeps models in memory, and in which precision.

python scripts/test.py --slow tests/host/test_options.py -s     a server for each; on a machine without a GPU those
                                                               that need one are left out
"""

from __future__ import annotations

import pytest
import torch
from environment import ensure_environment, has_accelerator
from graphs import to_api
from host import Server
from small_graphs import Avatars, latents

OPTIONS = {  # and by how many spreads of the pictures they may change one
    "as it is": ((), 0), "cache, classic": (("--cache-classic",), 0), "cache, LRU": (("--cache-lru", "3"), 0),
    "cache, none": (("--cache-none",), 0), "cache, RAM pressure": (("--cache-ram", "1"), 0),
    "RAM pressure at once": (("--cache-ram", "10000"), 0), "several users": (("--multi-user",), 0),
    "async offload": (("--async-offload",), 0), "no smart memory": (("--disable-smart-memory",), 0),
    "deterministic": (("--deterministic",), 0), "previews": (("--preview-method", "latent2rgb"), 0),
    "channels last": (("--force-channels-last",), 0.01), "U-Net in bf16": (("--bf16-unet",), 0.1),
    "U-Net in fp16": (("--fp16-unet",), 0.02), "U-Net in fp8": (("--fp8_e4m3fn-unet",), 0.5),
    "fp16 between nodes": (("--fp16-intermediates",), 0.02),
}  # fmt: skip
OF_A_GPU = {"low memory": ("--lowvram",), "no memory": ("--novram",), "all on the GPU": ("--gpu-only",)}


def drawn(server: Server) -> list[torch.Tensor]:
    """Pictures without Steer, with it, with another strength, and with the first again, of four prompts in turn."""
    found = []
    for strength in (None, 1.0, 0.5, 1.0):
        graph = Avatars(pictures=3)
        steer = {} if strength is None else {"model": graph.steer(graph.recipe(), strength=strength, hold="on")[0]}
        node = graph.save(graph.draw(**steer))
        found.append(latents(server, server.run(to_api(graph), timeout=1800), node))
    return found


@pytest.fixture(scope="module")
def expected(server):
    return drawn(server)


def compared(found: list[torch.Tensor], expected: list[torch.Tensor], within: float) -> None:
    assert torch.equal(found[1], found[3]) and not torch.equal(found[1], found[2])
    spread = float(expected[0].std())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=within * spread)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_are_the_same_under_every_option(expected, name):
    options, within = OPTIONS[name]
    with Server(cpu=True, args=options, boot_timeout=900) as running:
        compared(drawn(running), expected, within)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_GPU)
def test_pictures_are_near_however_a_gpu_keeps_the_model(expected, name):
    if not has_accelerator(ensure_environment()):
        pytest.skip("no GPU")
    with Server(cpu=False, args=OF_A_GPU[name], boot_timeout=900) as running:
        compared(drawn(running), expected, 0.02)
