"""Rebuild every file under models/scenes/ from seeds. Needs models/prompted_avatars/: training begins from it.

    python models/making/make_scenes.py            the stages whose files are not there, in order
    python models/making/make_scenes.py denoiser   one stage again: its files are replaced

A stage that is cut off goes on from its last checkpoint in models/scenes/.work/.
"""

from __future__ import annotations

from pathlib import Path

import make_prompted_avatars as prompted  # sets the path for what follows
import numpy as np
import scenes
import torch
from make_prompted_avatars import Prompted
from precision import autocast
from stages import (
    accuracies,
    attributes_loss,
    augment,
    build,
    denoiser_loss,
    fit_readers,
    to_tensor,
    train_network,
)
from torch.nn import functional as F

from difflens_core.classifiers import FramedClassifier, cut_frame, save_classifier
from difflens_core.networks import (
    END,
    UNKNOWN,
    Denoiser,
    DenoiserConfig,
    TextEncoder,
    load_denoiser,
    save_denoiser,
)

OUT = Path(__file__).resolve().parents[1] / "scenes"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "scenes.safetensors"
CLASSIFIER_FILE = OUT / "difflens_classifiers" / "scenes.safetensors"

DENOISER = {
    "images": 10_000, "steps": 4_000, "batch": 3_072, "lr": 1e-3, "ema": 0.999, "seed": 21, "unconditional": 0.1,
    "unknown": 0.03,
}  # fmt: skip
CLASSIFIER = {"images": 24_000, "test_images": 1_000, "epochs": 8, "batch": 100, "lr": 3e-3, "seed": 1_200}
LARGEST = 96  # side that the position's map is of


def untrained() -> Prompted:
    """Denoiser and text encoder whose layers, but for the words, begin as those of the avatars at work."""
    torch.manual_seed(DENOISER["seed"])
    model = Prompted()
    model.text = TextEncoder(scenes.WORDS)
    old = load_denoiser(prompted.DENOISER_FILE).state_dict()
    model.denoiser = Denoiser(DenoiserConfig(LARGEST, context_width=model.text.width, any_size=True))
    side = LARGEST // 8
    old["position"] = F.interpolate(old["position"], (side, side), mode="bilinear")
    model.denoiser.load_state_dict(old)
    return model


def train_denoiser() -> None:
    c = DENOISER
    drawn = [scenes.render(c["images"], c["seed"] + number, False, size) for number, size in enumerate(scenes.SIZES)]
    model = untrained()
    tokens = [model.text.tokens(prompts) for _, _, prompts, _ in drawn]

    def loss_at() -> torch.Tensor:
        number = int(torch.randint(len(drawn), ()))
        images, size = drawn[number][0], scenes.SIZES[number]
        picks = torch.randint(len(images), (c["batch"] * 64 // (size[0] * size[1]),))
        chosen = tokens[number][picks]
        chosen[torch.rand(len(picks)) < c["unconditional"]] = END
        forgotten = (torch.rand(chosen.shape) < c["unknown"]) & (chosen != END)
        context = model.text(chosen.masked_fill(forgotten, UNKNOWN))
        x0 = to_tensor(images[picks.numpy()])
        return denoiser_loss(lambda noisy, sigma: model.denoiser(noisy, sigma, context), x0)

    ema = train_network(model, loss_at, c, WORK / "denoiser.pt")
    save_denoiser(DENOISER_FILE, ema.denoiser, {"training": c}, ema.text)


def draw_balanced(count: int, seed: int) -> list[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
    """Pictures, traits and frames (x, y, side: see `FramedClassifier.found`) of every size."""
    drawn = []
    for number, size in enumerate(scenes.SIZES):
        pictures, traits, _, corners = scenes.render(count, seed + number, True, size)
        centre, side = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 3:] - corners[:, 1:2]
        drawn.append((pictures, traits, np.concatenate([centre, side], axis=1)))
    return drawn


def shaken(frames: torch.Tensor) -> torch.Tensor:
    """Frames as they may be found: a little beside, larger or smaller."""
    beside = 0.04 * torch.randn(len(frames), 2) * frames[:, 2:]
    return torch.cat([frames[:, :2] + beside, frames[:, 2:] * (1 + 0.05 * torch.randn(len(frames), 1))], dim=1)


def train_classifier() -> None:
    c = CLASSIFIER
    torch.manual_seed(c["seed"])
    whole = {"background": scenes.BACKGROUNDS}
    model = FramedClassifier({n: of for n, of in scenes.ATTRIBUTES.items() if n not in whole}, whole)
    drawn = draw_balanced(c["images"] // len(scenes.SIZES), c["seed"])

    def loss_at(step: int) -> torch.Tensor:
        pictures, traits, frames = drawn[step % len(drawn)]
        picks = torch.randint(len(pictures), (c["batch"],)).numpy()
        x, frame = augment(to_tensor(pictures[picks]), shift=0) / 2 + 0.5, torch.from_numpy(frames[picks])
        with autocast():
            logits = model.figure.logits(cut_frame(x, shaken(frame), model.size)) | model.whole.logits(x)
            missed = F.smooth_l1_loss(model.found(x).float(), frame, beta=0.02)
        return attributes_loss(logits, {n: torch.from_numpy(traits[n][picks]) for n in logits}) + 100 * missed

    fit_readers(model, loss_at, c)
    accuracy = {}
    for size, (pictures, traits, frames) in zip(
        scenes.SIZES, draw_balanced(c["test_images"], c["seed"] + 10), strict=True
    ):
        told = accuracies(model, pictures, traits, model.attributes)
        found = model.frames(torch.from_numpy(pictures).float() / 255)
        side = (found[:, 3] - found[:, 1] - torch.from_numpy(frames[:, 2])).abs().mean()
        accuracy[" x ".join(map(str, size))] = told
        print(size, told, f"side missed by {float(side):.3f}", flush=True)
    save_classifier(CLASSIFIER_FILE, model, {"training": c, "accuracy": accuracy})


STAGES = {
    "classifier": (train_classifier, CLASSIFIER_FILE),
    "denoiser": (train_denoiser, DENOISER_FILE),
}

if __name__ == "__main__":
    build(STAGES, WORK, __doc__)
