"""Run by test_unconditional.py in a Python of its own, as ComfyUI runs the pack: what no graph shows of a MODEL.

    python in_comfyui.py COMFYUI MODEL...

Prints what it found for each MODEL as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from launch_comfyui import install_mends  # noqa: E402

install_mends()
sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True  # before anything asks for a device

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)

from pack.nodes import host  # noqa: E402


def draw(model) -> torch.Tensor:
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cond, sigmas = host.unconditional_conditioning(), host.ddim_sigmas(model, 3, "trailing")
    euler = comfy.samplers.ksampler("euler")
    return comfy.sample.sample_custom(model, noise, 1.0, euler, sigmas, cond, cond, torch.zeros_like(noise))


def look_at(path: str) -> dict:
    model, _, _ = host.load_model(path)
    network, plain = model.model.diffusion_model, draw(model)
    sites = host.some_sites(model)
    moved = {}
    for site in sites:
        edited = host.apply_site(model, site, lambda h, progress, images: h * 1.5, "test")
        moved[site] = not torch.equal(draw(edited), plain)
    # As a LoRA changes weights, which the mark of the model is not to tell.
    patched, last = model.clone(), list(network.state_dict())[-1]
    assert patched.add_patches({f"diffusion_model.{last}": ("diff", (torch.ones(network.get_parameter(last).shape),))})
    lora = not torch.equal(draw(patched), plain) and host.model_fingerprint(patched) == host.model_fingerprint(model)
    with torch.inference_mode(False):
        copy = model.clone(force_deepcopy=True)
    assert copy.model.diffusion_model is not network and torch.equal(draw(copy), plain)
    assert torch.equal(draw(model), plain) and not any(module._forward_hooks for module in network.modules())
    dtype = str(model.model_dtype())
    network.half()  # as a GPU would run it
    half = network(torch.randn(1, 3, 16, 16).half(), torch.tensor([7.0]), transformer_options={})
    sampling = model.get_model_object("model_sampling")
    return {
        "sites": moved,
        "patched": lora,
        "widths": [host.site_width(model, site) for site in sites],
        "width": host.site_width(model, "middle_block"),
        "fingerprint": host.model_fingerprint(model),
        "half": str(half.dtype) if half.isfinite().all() else "not finite",
        "memory": model.memory_required([2, 3, 64, 64]),
        "middle": float(sampling.timestep(torch.tensor(sampling.percent_to_sigma(0.5)))),
        "ends": [sampling.percent_to_sigma(0.0) > float(sampling.sigma_max), sampling.percent_to_sigma(1.0)],
        "dtype": dtype,
    }


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps([look_at(path) for path in sys.argv[2:]]))
