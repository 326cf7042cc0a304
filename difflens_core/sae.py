"""The sparse autoencoder (SAE): hidden states as a few active latents out of many.

A TopK SAE (Gao et al. 2024, arXiv 2406.04093) applied at every position of the site's map. With the input
normalised per sampling step, x = (h - mean_t) / scale_t,

    z = TopK(ReLU(E x + b_e)),    x^ = D z + b_d,    h^ = mean_t + scale_t x^
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activations
from .files import DiffLensError, load_tensors, save_tensors

TENSORS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
NORMALISATION = ("progress", "mean", "scale")


class Latents(NamedTuple):
    """The k active latents of every position, sparse.

    values: ... x k, not negative, largest first; indices: ... x k, which latent each value belongs to.
    """

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Normalisation:
    """Per-step mean and scale of a site's activations.

    progress: S, increasing, the share of the sampling that lies behind each step (0 is pure noise, 1 the picture);
    mean: S x C; scale: S. A sampling step uses the row whose progress is nearest.
    """

    progress: Tensor
    mean: Tensor
    scale: Tensor

    def step_at(self, progress: float) -> int:
        """Row that serves a sampling step at `progress`."""
        return nearest_step(self.progress, progress)

    def apply(self, h: Tensor, step: int) -> Tensor:
        """Activations B x C x H x W to normalised rows B x (H W) x C in fp32."""
        rows = h.flatten(2).transpose(1, 2).float()
        return (rows - self.mean[step]) / self.scale[step]

    def to(self, device: torch.device | str) -> Normalisation:
        return Normalisation(self.progress, self.mean.to(device), self.scale.to(device))


def nearest_step(grid: Tensor, progress: float) -> int:
    """Index of the entry of `grid` (on the CPU) nearest to `progress`."""
    return int((grid - progress).abs().argmin())


def fit_normalisation(activations: Activations) -> Normalisation:
    """Mean vector and one scale (root mean square distance from the mean) of every step, read in one pass.

    Steps on which all pictures still agree (near pure noise) get at least a twentieth of the largest scale, so that
    their rounding noise is not blown up.
    """
    steps, rows = len(activations.progress), activations.pictures * activations.positions
    total, square = torch.zeros(2, steps, activations.width, dtype=torch.float64)
    for s in range(steps):
        for _, values in activations.batches(s):
            values = values.double()  # the difference of squares below needs the digits
            total[s] += values.sum(dim=(0, 2, 3))
            square[s] += values.square().sum(dim=(0, 2, 3))
    mean = total / rows
    scale = (square / rows - mean.square()).mean(dim=1).clamp(min=0).sqrt()
    if float(scale.max()) <= 1e-7 * float(mean.abs().max()):
        raise DiffLensError("the activations are the same in every picture and position: there is nothing to train on.")
    return Normalisation(activations.progress.float(), mean.float(), scale.clamp(min=float(scale.max()) / 20).float())


@dataclass(frozen=True)
class SparseAutoencoder:
    """A trained TopK SAE.

    encoder: N x C, encoder_bias: N, decoder: N x C with rows of unit length, decoder_bias: C, in fp32; k active
    latents a position; `site` names the module it was trained on; `info` holds training and quality figures.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    normalisation: Normalisation
    k: int
    site: str
    info: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "topk"
    threshold: Tensor | None = None

    def __post_init__(self) -> None:
        n, c = self.encoder.shape
        expected = {"encoder_bias": (n,), "decoder": (n, c), "decoder_bias": (c,)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                found = tuple(getattr(self, name).shape)
                raise DiffLensError(f"SAE: {name} has shape {found}, expected {shape} for {n} latents of width {c}.")
        if not 1 <= self.k <= n:
            raise DiffLensError(f"SAE: k is {self.k}, expected 1 to {n}, the number of latents.")

    @property
    def width(self) -> int:
        return self.encoder.shape[1]

    @property
    def latents(self) -> int:
        return self.encoder.shape[0]

    def encode(self, h: Tensor, step: int) -> Latents:
        """Latents (B x (H W) x k) of activations B x C x H x W taken at row `step` of the normalisation."""
        if h.shape[1] != self.width:
            raise DiffLensError(f"SAE for {self.site}: got activations of width {h.shape[1]}, expected {self.width}.")
        return top_k(F.linear(self.normalisation.apply(h, step), self.encoder, self.encoder_bias), self.k)

    def decode(self, latents: Latents) -> Tensor:
        """Reconstruction in normalised units, B x (H W) x C."""
        return sparse_decode(latents, self.decoder) + self.decoder_bias

    def reconstruct(self, h: Tensor, step: int) -> Tensor:
        """h^ of activations h, both B x C x H x W."""
        rows = self.decode(self.encode(h, step)) * self.normalisation.scale[step] + self.normalisation.mean[step]
        return rows.transpose(1, 2).reshape(h.shape)

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved, normalisation=self.normalisation.to(device))


def top_k(pre_activations: Tensor, k: int) -> Latents:
    """The k largest of ReLU(pre_activations) along the last axis."""
    values, indices = pre_activations.topk(k, dim=-1)
    return Latents(values.relu(), indices)


def sparse_decode(latents: Latents, decoder: Tensor) -> Tensor:
    """Sum of the active rows of `decoder` (N x C), weighted by their values: ... x C, without a dense latent."""
    k = latents.indices.shape[-1]
    rows = F.embedding_bag(
        latents.indices.reshape(-1, k), decoder, per_sample_weights=latents.values.reshape(-1, k), mode="sum"
    )
    return rows.unflatten(0, latents.indices.shape[:-1])


def save_sae(path: str | Path, sae: SparseAutoencoder, dtype: torch.dtype = torch.float32) -> None:
    """Write an SAE; `dtype` may be float16 to halve the file."""
    tensors = {name: getattr(sae, name).to(dtype) for name in TENSORS}
    tensors |= {f"normalisation.{name}": getattr(sae.normalisation, name) for name in NORMALISATION}
    save_tensors(path, "sae", tensors, {"k": sae.k, "site": sae.site, "info": dict(sae.info)})


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Read an SAE that `save_sae` wrote; weights come back in fp32. Raises `DiffLensError` if it does not fit."""
    wanted = [*TENSORS, *(f"normalisation.{name}" for name in NORMALISATION)]
    tensors, info = load_tensors(path, "sae", needs=[*wanted, "k", "site"])
    parts = [tensors[name].float() for name in wanted]
    return SparseAutoencoder(
        *parts[:4], Normalisation(*parts[4:]), k=int(info["k"]), site=info["site"], info=info.get("info", {})
    )
