"""Products with a sparse matrix of latents, forward and backward, without ever building it densely.

A batch of B rows has M active latents in all. Beside the product that finds them, everything a TopK SAE does in
training touches M x C numbers: decoding gathers M rows of the decoder, the gradients of encoder and decoder are sums
of M weighted rows. `embedding_bag` does such sums in parallel and in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Active(NamedTuple):
    """The active latents of B rows, row after row.

    values: M; indices: M, which latent each belongs to; starts: B, where each row's entries begin.
    """

    values: Tensor
    indices: Tensor
    starts: Tensor

    def rows(self) -> Tensor:
        """Which row each entry belongs to (M)."""
        total = len(self.indices)
        counts = self.starts.diff(append=self.starts.new_tensor([total]))
        return torch.arange(len(self.starts), device=self.starts.device).repeat_interleave(counts, output_size=total)


def bag(weights: Tensor, indices: Tensor, starts: Tensor, matrix: Tensor) -> Tensor:
    """Weighted sums of rows of `matrix`: output b is the sum over its entries m of weights[m] matrix[indices[m]]."""
    return F.embedding_bag(indices, matrix, starts, per_sample_weights=weights, mode="sum")


def transposed(active: Active, size: int) -> Active:
    """Z^T for the sparse B x size matrix Z: its rows are the `size` latents, its indices the B rows of Z."""
    order = active.indices.argsort(stable=True)
    starts = torch.bincount(active.indices, minlength=size).cumsum(0).roll(1)
    starts[0] = 0
    return Active(active.values[order], active.rows()[order], starts)


def dots(active: Active, matrix: Tensor, rows: Tensor) -> Tensor:
    """Inner product of matrix[indices[m]] with the row (of B x C `rows`) that entry m belongs to: M."""
    with torch.inference_mode(False), torch.enable_grad():
        # The gradient of a weighted sum with respect to its weights is that inner product.
        weights = torch.zeros_like(active.values).requires_grad_()
        out = bag(weights, active.indices, active.starts, matrix.detach())
        return torch.autograd.grad(out, weights, rows)[0]


class _Encode(torch.autograd.Function):
    """Pre-activations of the active latents, x . E_n + b_n, already known: only their gradient is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, *active: Tensor) -> Tensor:
        ctx.save_for_backward(x, *active[1:])
        ctx.latents = len(bias)
        return active[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, starts = ctx.saved_tensors
        by_latent = transposed(Active(grad, indices, starts), ctx.latents)
        bias = bag(*by_latent, x.new_ones(len(x), 1))[:, 0]
        return None, bag(*by_latent, x), bias, None, None, None


class _Decode(torch.autograd.Function):
    """Sum of the active rows of the decoder (N x C), weighted by their values: B x C."""

    @staticmethod
    def forward(ctx: Any, decoder: Tensor, *active: Tensor) -> Tensor:
        ctx.save_for_backward(decoder, *active)
        return bag(*Active(*active), decoder)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decoder, *parts = ctx.saved_tensors
        active = Active(*parts)
        return bag(*transposed(active, len(decoder)), grad), dots(active, decoder, grad), None, None


def encode_active(x: Tensor, encoder: Tensor, bias: Tensor, active: Active) -> Active:
    """`active` with values that carry the gradient to encoder (N x C) and bias (N), negative ones set to 0.

    active.values must be the pre-activations x . E_n + b_n; x (B x C) gets no gradient.
    """
    values = _Encode.apply(x, encoder, bias, *active)
    return active._replace(values=values.relu())


def decode_active(active: Active, decoder: Tensor) -> Tensor:
    """Decoded rows (B x C) without the decoder's bias, with gradients to the values and to decoder (N x C)."""
    return _Decode.apply(decoder, *active)


def top_k_active(pre: Tensor, k: int) -> Active:
    """The k largest of every row of the pre-activations (B x N)."""
    values, indices = pre.topk(k, dim=1, sorted=False)
    starts = torch.arange(0, values.numel(), k, device=pre.device)
    return Active(values.flatten(), indices.flatten(), starts)


def threshold_active(pre: Tensor, threshold: Tensor) -> Active:
    """All pre-activations (B x N) that reach `threshold` and are positive."""
    on = (pre >= threshold) & (pre > 0)
    indices = on.nonzero()[:, 1]
    starts = on.sum(dim=1).cumsum(0).roll(1)
    starts[0] = 0
    return Active(pre[on], indices, starts)
