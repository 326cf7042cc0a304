"""Rebuild every file under models/avatars/ from seeds.

    python models/make_avatars.py            all stages, in order; finished stages are skipped
    python models/make_avatars.py denoiser   one stage again

A stage that is cut off goes on from its last checkpoint in models/avatars/.work/.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import portraits  # noqa: E402

from difflens_core.denoiser import Denoiser  # noqa: E402

OUT = ROOT / "models" / "avatars"
WORK = OUT / ".work"

DENOISER = {"images": 40_000, "steps": 4_200, "batch": 64, "lr": 1e-3, "ema": 0.999, "seed": 1}


def to_tensor(images) -> torch.Tensor:
    """uint8 B x H x W x 3 to float B x 3 x H x W in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def denoiser_loss(model: Denoiser, x0: torch.Tensor) -> torch.Tensor:
    """Clean-picture loss under x_t = (1 - sigma) x0 + sigma noise, sigma uniform.

    The weight 1 / (sigma^2 + 0.02) lies between the x0 loss and the velocity loss, so that details count.
    """
    sigma = torch.rand(len(x0))
    s = sigma[:, None, None, None]
    noisy = (1 - s) * x0 + s * torch.randn_like(x0)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, sigma)
    error = (predicted.float() - x0).square().mean(dim=(1, 2, 3))
    return (error / (sigma.square() + 0.02)).mean()


def train_denoiser() -> None:
    c = DENOISER
    images, _ = portraits.render(c["images"], seed=c["seed"], balanced=False)
    torch.manual_seed(c["seed"])
    model = Denoiser()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, 1.0, 200)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, c["steps"] - 200, c["lr"] * 0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [warmup, decay], [200])
    parts = {"model": model, "ema": ema, "optimiser": optimiser, "schedule": schedule}
    checkpoint = WORK / "denoiser.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    began, running = time.time(), 0.0
    for step in range(start, c["steps"]):
        torch.manual_seed(c["seed"] * 1_000_003 + step)  # a resumed run sees the same batches and noise
        batch = to_tensor(images[torch.randint(len(images), (c["batch"],)).numpy()])
        loss = denoiser_loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        keep = min(c["ema"], (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - start) / (time.time() - began)
            print(f"denoiser {step + 1}/{c['steps']} loss {running:.4f} {speed:.2f} steps/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == c["steps"]:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


def main() -> None:
    torch.set_flush_denormal(True)  # tiny Adam moments would slow the CPU many times over
    WORK.mkdir(parents=True, exist_ok=True)
    train_denoiser()


if __name__ == "__main__":
    main()
