"""Two published ways to steer a prompt without training the model, written from their papers, to compare with.

Semantic guidance adds guidance by further prompts to classifier-free guidance. A latent direction adds one learned map
to the denoiser's h-space. Both steer every picture towards a class of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models" / "making")]

from stages import denoiser_loss  # noqa: E402

from difflens_core.activations import edit_site  # noqa: E402
from difflens_core.networks import Denoiser, Guidance  # noqa: E402

TargetOf = Callable[[Tensor], Tensor]  # class (B, int64) that pictures (B, their indices in the run) are asked to show


@dataclass(frozen=True)
class SemanticGuidance:
    """SEGA (Brack et al. 2023, arXiv 2301.12247) with the pair of prompts of Fair Diffusion (Friedrich et al. 2023,
    arXiv 2302.10893).

    edits: K x T x D, a prompt for every class. Of the differences eps(edit prompt) - eps(empty prompt), the one of the
    class asked for is added and those of its rivals are taken away, `scale` times; of each only the pixels whose
    absolute value reaches quantile `threshold` of their channel. Momentum carries earlier steps over. Nothing is added
    during the first `warmup` steps. The rivals' weights sum to 1, so that what all edit prompts have in common
    cancels; with two classes that is Fair Diffusion's own pair. `scale`, `momentum` and `beta` are Fair Diffusion's.
    Its warm-up of a fifth of the steps and threshold of 0.95 leave most of these small pictures as they were: here
    guidance begins after one step, and a fifth of the pixels takes part.
    """

    edits: Tensor
    target_of: TargetOf
    scale: float = 4.0
    threshold: float = 0.8
    warmup: int = 1
    momentum: float = 0.3
    beta: float = 0.6

    def signs(self, images: Tensor) -> Tensor:
        """Weight (B x K) of every edit prompt: 1 for the class asked for, -1 / (K - 1) for its rivals."""
        k = len(self.edits)
        return F.one_hot(self.target_of(images), k) * (1 + 1 / (k - 1)) - 1 / (k - 1)

    def term(self, edited: Tensor, empty: Tensor, signs: Tensor) -> Tensor:
        """Guidance (B x C x H x W) without momentum, from the predictions of the edit prompts (K x B x C x H x W).

        Right for predictions of x0 as of noise: one is the other times a number, and the threshold has no scale.
        """
        differences = edited - empty
        size = differences.abs()
        cut = size.flatten(3).quantile(self.threshold, dim=3)[..., None, None]
        return self.scale * torch.einsum("bk,kbchw->bchw", signs, differences * (size >= cut))


@torch.inference_mode()
def sample_semantic(
    model: Denoiser, noise: Tensor, steps: int, semantic: SemanticGuidance, guidance: Guidance, first_image: int = 0
) -> Tensor:
    """`difflens_core.networks.sample` under semantic guidance; arguments and result as there.

    The papers guide the predicted noise, this model predicts the clean picture. With x_t = (1 - sigma) x0 + sigma eps,
    a change of eps is that of x0 times -ratio, ratio = (1 - sigma) / sigma. Momentum is kept for eps, as in the papers,
    since the ratio differs from step to step. At sigma 1 x0 says nothing of eps, so the warm-up must be 1 at least.
    """
    x, images, velocity = noise, torch.arange(first_image, first_image + len(noise)), torch.zeros_like(noise)
    signs, sigmas = semantic.signs(images).to(noise.dtype), torch.linspace(1, 0, steps + 1)
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):

        def predict(context: Tensor, x: Tensor = x, sigma: Tensor = sigma) -> Tensor:
            return model(x, sigma.expand(len(x)), context.expand(len(x), -1, -1))

        empty = predict(guidance.empty)
        x0 = torch.lerp(empty, predict(guidance.context), guidance.cfg)
        edited = torch.stack([predict(edit[None]) for edit in semantic.edits])
        ratio = (1 - sigma) / sigma
        change = -ratio * semantic.term(edited, empty, signs) + semantic.momentum * velocity
        velocity = semantic.beta * velocity + (1 - semantic.beta) * change
        if i >= semantic.warmup:
            x0 = x0 - change / ratio
        x = x0 + (x - x0) * (following / sigma)
    return x.clamp(-1, 1)


@dataclass(frozen=True)
class LatentDirection:
    """Self-discovered directions (Li et al. 2024, arXiv 2311.17216) as an edit: h' = h + strength * direction.

    directions: K x C x H x W, one of every class for the output of `site`. The same at every step, for every picture.
    """

    directions: Tensor
    target_of: TargetOf
    strength: float = 1.0
    site: str = "middle_block"

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        return h + (self.strength * self.directions[self.target_of(images)]).to(h.dtype)


def direction_loss(model: Denoiser, directions: Tensor, pictures: Tensor, context: Tensor, classes: Tensor) -> Tensor:
    """Denoising loss of pictures (B x 3 x H x W, in [-1, 1]) when the directions of their classes (B) are added.

    It is the loss that the model itself was trained by; noise and noise level come from torch's global generator.
    """
    with edit_site(model, "middle_block", lambda h: h + directions[classes]):
        return denoiser_loss(lambda noisy, sigma: model(noisy, sigma, context), pictures)


def learn_directions(
    model: Denoiser,
    pictures: Tensor,
    context: Tensor,
    classes: Tensor,
    steps: int = 200,
    batch: int = 16,
    lr: float = 0.02,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Tensor:
    """One direction a class (K x C x H x W, zero at the start) that explains what the prompt does not say.

    pictures: N x 3 x H x W in [-1, 1], sampled from prompts that name their class (classes: N). context: N x T x D of
    the same prompts without it. Every step takes `batch` pictures of every class. Only the directions are trained, by
    Adam. The rate falls to 0: at so few steps the constant 0.1 of the authors' code leaves noise in the pictures.
    """
    side = model.config.size // 8
    directions = torch.zeros(int(classes.max()) + 1, model.config.width, side, side, requires_grad=True)
    optimiser = torch.optim.Adam([directions], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    of_class = [(classes == c).nonzero().flatten() for c in range(len(directions))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            picks = torch.cat([own[torch.randint(len(own), (batch,))] for own in of_class])
            loss = direction_loss(model, directions, pictures[picks], context[picks], classes[picks])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            on_step(step + 1, loss.item())
    return directions.detach()
