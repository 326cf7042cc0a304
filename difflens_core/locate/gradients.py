"""Integrated Gradients of any differentiable objective, through as much of the network as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ..sae import Latents, SparseAutoencoder, sparse_decode

# Hidden states (M x C x H x W) and which picture each belongs to (M, int64) to one number each (M).
Objective = Callable[[Tensor, Tensor], Tensor]


def integrated_gradients_of(
    objective: Objective, h: Tensor, sae: SparseAutoencoder, step: int, points: int = 32, batch: int = 32
) -> tuple[Latents, Tensor, Tensor]:
    """IG (Sundararajan et al. 2017) of `objective` with respect to the active latents of h (B x C x H x W).

    The path h(a) = h - (1 - a) scale D z leads from no latents (a = 0) to h itself (a = 1); what the SAE does not
    explain stays the same all along. IG_n = z_n scale <D_n, integral of the objective's gradient at h(a) da>, by
    Gauss-Legendre quadrature with `points` nodes, so that autograd only sees h and never the latents.

    `step`: row of the SAE's normalisation; `batch`: hidden states that go through the objective at once, which
    bounds the memory. Returns the latents (B x P x k), their IG (like the values) and the completeness error
    |sum of IG - (objective(h(1)) - objective(h(0)))| of every picture (B): where it is large, use more points.
    """
    with torch.inference_mode(False), torch.enable_grad():
        h, pictures = h.clone(), torch.arange(len(h), device=h.device)
        values, indices = (part.clone() for part in sae.encode(h, step))
        decoder = sae.decoder * sae.normalisation.scale[step]
        decoded = sparse_decode(Latents(values.requires_grad_(), indices), decoder)
        explained = sae.unflat(decoded.detach(), h.shape)
        gradient = torch.zeros_like(explained)
        nodes, weights = (torch.tensor(x, dtype=torch.float32, device=h.device) / 2 for x in leggauss(points))
        for rows in torch.arange(points * len(h), device=h.device).split(batch):
            node, who = rows // len(h), rows % len(h)
            left_out = (0.5 - nodes[node])[:, None, None, None]  # 1 - a
            at = (h[who] - left_out * explained[who]).to(h.dtype).requires_grad_()
            (slope,) = torch.autograd.grad(objective(at, who).sum(), at)
            gradient.index_add_(0, who, slope.float() * weights[node, None, None, None])
        # The derivative of D z by z_n at a position is D_n, so this is <D_n, gradient> for the active latents alone.
        (along,) = torch.autograd.grad(decoded, values, sae.flat(gradient))
    ig = (values * along).detach()

    @torch.no_grad()
    def value_at(states: Tensor) -> Tensor:
        parts = zip(states.split(batch), pictures.split(batch), strict=True)
        return torch.cat([objective(part, who) for part, who in parts])

    gain = value_at(h) - value_at((h - explained).to(h.dtype))
    return Latents(values.detach(), indices), ig, (ig.sum(dim=(1, 2)) - gain).abs()


def picture_objective(
    rest: Callable[[Tensor, Tensor], Tensor],
    logits_of: Callable[[Tensor], Mapping[str, Tensor]],
    attribute: str,
    target: Tensor,
) -> Objective:
    """Probability of class `target` (B) in the clean picture that a network predicts from the output of a site.

    rest(h, pictures): what comes of hidden states (M x C x H x W) of pictures (M) in the rest of the network;
    logits_of: a classifier's logits (M x K) of that, by attribute. Both must stand still (`requires_grad_(False)`).
    """

    def objective(h: Tensor, pictures: Tensor) -> Tensor:
        logits = logits_of(rest(h, pictures))[attribute]
        return logits.softmax(dim=1).gather(1, target[pictures, None])[:, 0]

    return objective
