"""What training an SAE minimises, for one process or several that share each batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..processes import process
from .autoencoder import SparseAutoencoder
from .sparse import Active, decode_active, dots, encode_active, threshold_active, top_k_active

ACTIVATIONS = ("topk", "batchtopk")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainingOptions:
    """latents: N; k: active latents a position; steps: optimiser steps of `batch` positions; lr: peak learning rate.

    activation: "topk", or "batchtopk" (k on average over a batch); precision: "fp32", or "bf16" to choose the active
    latents by a half-precision product (their values, and all gradients, are exact still); aux_k: dead latents that
    explain the residual; dead_after: steps without firing after which a latent is dead.
    """

    latents: int = 2048
    k: int = 32
    steps: int = 2000
    batch: int = 2048
    lr: float = 1e-3
    activation: str = "topk"
    precision: str = "fp32"
    aux_k: int = 64
    dead_after: int = 100
    seed: int = 0


class BatchLoss(nn.Module):
    """FVU of a batch plus the AuxK loss (Gao et al. 2024, arXiv 2406.04093, A.2) as a module with the SAE's weights.

    A module because DistributedDataParallel wraps one. With several processes each sees its own rows of the batch,
    and the mean over processes of the loss, and so of its gradients, is that of the whole batch.
    """

    def __init__(self, sae: SparseAutoencoder, options: TrainingOptions):
        super().__init__()
        self.options = options
        self.encoder = nn.Parameter(sae.encoder.clone())
        self.encoder_bias = nn.Parameter(sae.encoder_bias.clone())
        self.decoder = nn.Parameter(sae.decoder.clone())
        self.decoder_bias = nn.Parameter(sae.decoder_bias.clone())

    def forward(self, rows: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, which latents fired (N, bool) and the smallest active value, for rows B x C; dead: N, bool."""
        o = self.options
        with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16, enabled=o.precision == "bf16"):
            pre = F.linear(rows, self.encoder, self.encoder_bias)
        active = self.encode(rows, batch_top_k(pre, o.k) if o.activation == "batchtopk" else top_k_active(pre, o.k))
        rebuilt = decode_active(active, self.decoder) + self.decoder_bias
        scale = process()[1] / total_variance(rows)
        loss = F.mse_loss(rebuilt, rows, reduction="sum") * scale
        candidates = dead.nonzero()[:, 0]
        if len(candidates) and o.aux_k:
            chosen = top_k_active(pre[:, candidates], min(o.aux_k, len(candidates)))
            aux = self.encode(rows, chosen._replace(indices=candidates[chosen.indices]))
            residual = rows - rebuilt.detach()
            loss = loss + F.mse_loss(decode_active(aux, self.decoder), residual, reduction="sum") * scale / 32
        fired = torch.zeros_like(dead)
        positive = active.values.detach() > 0
        fired[active.indices[positive]] = True
        smallest = active.values.detach().where(positive, torch.inf).min()
        return loss, fired, smallest

    def encode(self, rows: Tensor, chosen: Active) -> Active:
        """The chosen latents with exact values, whatever the precision they were chosen in."""
        chosen = chosen._replace(values=chosen.values.float())
        if self.options.precision == "bf16":
            exact = dots(chosen, self.encoder, rows) + self.encoder_bias.detach()[chosen.indices]
            chosen = chosen._replace(values=exact)
        return encode_active(rows, self.encoder, self.encoder_bias, chosen)


def over_processes(tensor: Tensor, how: str = "SUM") -> Tensor:
    """`tensor` summed (or MAX, MIN) over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
    return tensor


def total_variance(rows: Tensor) -> Tensor:
    """Sum of squared distances from the mean over the rows of all processes (scalar)."""
    count = over_processes(torch.tensor(float(len(rows)), device=rows.device))
    mean = over_processes(rows.sum(dim=0)) / count
    return over_processes((rows - mean).square().sum())


def batch_top_k(pre: Tensor, k: int) -> Active:
    """The k B largest of all B x N pre-activations (BatchTopK, Bussmann et al. 2024, arXiv 2412.06410).

    Looked for among the largest of every row, which is enough unless a row has nothing but winners.
    """
    count, width = k * len(pre), min(4 * k, pre.shape[1])
    while True:
        largest = pre.topk(width, dim=1).values
        threshold = kth_of_all(largest.flatten(), count)
        full = over_processes((largest[:, -1] >= threshold).any().float(), "MAX")
        if width == pre.shape[1] or not full:
            return threshold_active(pre, threshold)
        width = min(2 * width, pre.shape[1])


def kth_of_all(values: Tensor, count: int) -> Tensor:
    """The (count x processes)-th largest of the values of all processes."""
    if dist.is_initialized():
        parts = [torch.empty_like(values) for _ in range(process()[1])]
        dist.all_gather(parts, values)
        values = torch.cat(parts)
    return values.topk(count * process()[1]).values[-1]
