"""Sparse latents: which are kept, and their product with the decoder."""

from __future__ import annotations

import torch

from difflens_core.sae import Latents, sparse_decode
from difflens_core.sae.autoencoder import top_k


def dense(latents: Latents, size: int) -> torch.Tensor:
    return torch.zeros(*latents.indices.shape[:-1], size).scatter_add(-1, latents.indices, latents.values)


def test_negative_pre_activations_count_as_inactive():
    latents = top_k(torch.tensor([[-3.0, 2.0, -1.0]]), 2)
    assert latents.values.tolist() == [[2.0, 0.0]]


def test_sparse_decode_equals_the_dense_product_and_so_do_its_gradients(toys):
    sae, h = toys.sae(), toys.activations(pictures=3).values[0]
    found, latents = [], sae.encode(h, 0)
    for decode in (
        lambda z, d: sparse_decode(z, d),
        lambda z, d: torch.einsum("bpn,nc->bpc", dense(z, 20), d),
    ):
        values, decoder = latents.values.clone().requires_grad_(), sae.decoder.clone().requires_grad_()
        rows = decode(Latents(values, latents.indices), decoder)
        (rows * torch.arange(rows.numel()).view_as(rows)).sum().backward()
        found.append((rows, values.grad, decoder.grad))
    for sparse, expected in zip(*found, strict=True):
        torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-5)
