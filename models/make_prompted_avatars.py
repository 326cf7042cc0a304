"""Rebuild every file under models/prompted_avatars/ from seeds. Needs models/avatars/: training begins from it.

    python models/make_prompted_avatars.py            all stages, in order; finished stages are skipped
    python models/make_prompted_avatars.py denoiser   one stage again

A stage that is cut off goes on from its last checkpoint in models/prompted_avatars/.work/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import make_avatars as avatars
import prompted_portraits
import torch
from make_avatars import denoiser_loss, to_tensor, train_network
from torch import nn

from difflens_core.denoiser import Denoiser, DenoiserConfig, load_denoiser, save_denoiser
from difflens_core.text import END, TextEncoder

OUT = Path(__file__).resolve().parent / "prompted_avatars"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "prompted_avatars.safetensors"

DENOISER = {
    "images": 40_000, "steps": 2_200, "batch": 64, "lr": 1e-3, "ema": 0.999, "seed": 11, "unconditional": 0.1,
    "unknown": 0.03,
}  # fmt: skip


class Prompted(nn.Module):
    """Denoiser and text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(prompted_portraits.WORDS)
        self.denoiser = Denoiser(DenoiserConfig(context_width=self.text.width))
        weights = load_denoiser(avatars.DENOISER_FILE).state_dict()
        # Where each layer of the avatars' middle block lies once attention to the text stands between them.
        moved = {f"middle_block.{old}.": f"middle_block.{new}." for old, new in enumerate((0, 2, 3, 5))}
        for name in [*weights]:
            if name.startswith("middle_block."):
                prefix = name[: len("middle_block.0.")]
                weights[name.replace(prefix, "moved " + moved[prefix])] = weights.pop(name)
        weights = {name.removeprefix("moved "): tensor for name, tensor in weights.items()}
        missing, unexpected = self.denoiser.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.startswith(("middle_block.1.", "middle_block.4.")) for name in missing)


def train_denoiser() -> None:
    c = DENOISER
    images, _, prompts = prompted_portraits.render(c["images"], c["seed"], balanced=False)
    torch.manual_seed(c["seed"])
    model = Prompted()
    tokens = model.text.tokens(prompts)

    def loss_at() -> torch.Tensor:
        picks = torch.randint(len(images), (c["batch"],))
        chosen = tokens[picks]
        chosen[torch.rand(len(picks)) < c["unconditional"]] = END
        forgotten = (torch.rand(chosen.shape) < c["unknown"]) & (chosen != END)
        context = model.text(chosen.masked_fill(forgotten, 1))
        return denoiser_loss(lambda noisy, sigma: model.denoiser(noisy, sigma, context), to_tensor(images[picks.numpy()]))

    ema = train_network(model, loss_at, c, WORK / "denoiser.pt")
    save_denoiser(DENOISER_FILE, ema.denoiser, {"training": c}, ema.text)


STAGES = {"denoiser": (train_denoiser, DENOISER_FILE)}

if __name__ == "__main__":
    avatars.build(STAGES, WORK, sys.argv[1:])
