"""The sparse autoencoder (SAE): hidden states as a few active latents out of many.

It is applied at every position of the site's map, or once to the whole map. With the input normalised per sampling
step, x = (h - mean_t) / scale_t,

    z = activation(E x + b_e),    x^ = D z + b_d,    h^ = mean_t + scale_t x^

activation is one of
    topk       the k largest of ReLU(pre) at a position (Gao et al. 2024, arXiv 2406.04093)
    batchtopk  ReLU(pre) where pre > threshold, one for all latents, which stands in for the k largest on average over
               the batch that it was trained with (Bussmann et al. 2024, arXiv 2412.06410)
    jumprelu   ReLU(pre) where pre > threshold, one a latent (Rajamanoharan et al. 2024, arXiv 2407.14435)
    relu       ReLU(pre)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import UPDATE, Activations
from ..files import DiffLensError, as_half, load_tensors, reading, refuse_whole_numbers, save_tensors

TENSORS = ("encoder", "encoder_bias", "decoder", "decoder_bias")
NORMALISATION = ("progress", "mean", "scale")
SETTINGS = ("k", "site", "activation", "kernel")
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")


class Latents(NamedTuple):
    """The active latents of every position, sparse.

    values: ... x k, not negative, largest first; indices: ... x k, which latent each value belongs to. k is as large
    as the position with the most active latents needs; the others are filled up with latents of value 0.
    """

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Normalisation:
    """Per-step mean and scale of a site's activations.

    progress: S, increasing, the share of the sampling that lies behind each step (0 is pure noise, 1 the picture);
    mean: S x C; scale: S. A sampling step uses the row whose progress is nearest. modulation: S x 2 x C, of an encoder
    that is told the time: the gain and the offset of what it reads.
    """

    progress: Tensor
    mean: Tensor
    scale: Tensor
    modulation: Tensor | None = None

    def step_at(self, progress: float) -> int:
        """Row that serves a sampling step at `progress`."""
        return nearest_step(self.progress, progress)

    def apply(self, h: Tensor, step: int) -> Tensor:
        """Activations B x C x H x W to normalised rows B x (H W) x C in fp32."""
        rows = h.flatten(2).transpose(1, 2).float()
        return (rows - self.mean[step]) / self.scale[step]

    def modulated(self, rows: Tensor, step: int) -> Tensor:
        """Normalised rows (... x C) as the encoder reads them."""
        if self.modulation is None:
            return rows
        gain, offset = self.modulation[step]
        return rows * (1 + gain) + offset

    def at(self, progress: Tensor) -> Normalisation:
        """The rows nearest to steps at `progress`, for these steps."""
        rows = [self.step_at(float(step)) for step in progress]
        modulation = None if self.modulation is None else self.modulation[rows]
        return Normalisation(progress, self.mean[rows], self.scale[rows], modulation)

    def to(self, device: torch.device | str) -> Normalisation:
        modulation = None if self.modulation is None else self.modulation.to(device)
        return Normalisation(self.progress, self.mean.to(device), self.scale.to(device), modulation)


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
    """A trained SAE.

    encoder: N x width, encoder_bias: N, decoder: N x width, decoder_bias: width, in fp32; k: active latents a position
    (batchtopk: on average in training; 0 if not known); `site` names what it was trained on (see `activations`), a
    module's output or its update; `info` holds training and quality figures; activation: one of ACTIVATIONS;
    threshold: scalar or N for batchtopk and jumprelu; kernel: 1, or the side of the whole map, which then counts as one
    position of width C kernel kernel, flattened as h.flatten(1) does.
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
    kernel: int = 1

    def __post_init__(self) -> None:
        n, width = self.encoder.shape
        if not isinstance(self.site, str):
            raise DiffLensError(f"SAE: its site is {self.site!r:.80}, expected the name of a module.")
        if self.activation not in ACTIVATIONS:
            raise DiffLensError(f"SAE: activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
        if self.kernel < 1 or width % self.kernel**2:
            raise DiffLensError(f"SAE: a row of {width} numbers is no map of {self.kernel} x {self.kernel} positions.")
        if (self.threshold is not None) != (self.activation in ("batchtopk", "jumprelu")):
            given = "none" if self.threshold is None else "one"
            raise DiffLensError(f"SAE: batchtopk and jumprelu need a threshold, found {given} for {self.activation}.")
        steps = len(self.normalisation.progress)
        expected = {"encoder_bias": (n,), "decoder": (n, width), "decoder_bias": (width,)}
        found = {name: tuple(getattr(self, name).shape) for name in expected}
        expected |= {"normalisation.mean": (steps, self.channels), "normalisation.scale": (steps,)}
        found |= {f"normalisation.{name}": tuple(getattr(self.normalisation, name).shape) for name in ("mean", "scale")}
        if self.normalisation.modulation is not None:
            expected["normalisation.modulation"] = (steps, 2, width)
            found["normalisation.modulation"] = tuple(self.normalisation.modulation.shape)
        if self.threshold is not None and self.threshold.ndim:
            expected["threshold"], found["threshold"] = (n,), tuple(self.threshold.shape)
        for name, shape in expected.items():
            if found[name] != shape:
                raise DiffLensError(
                    f"SAE: {name} has shape {found[name]}, expected {shape} for {n} latents of width {width}."
                )
        if not (self.k == 0 and self.activation != "topk") and not 1 <= self.k <= n:
            raise DiffLensError(f"SAE: k is {self.k}, expected 1 to {n}, the number of latents.")

    @property
    def width(self) -> int:
        return self.encoder.shape[1]

    @property
    def channels(self) -> int:
        """C of the activations; the width, unless the kernel spans the whole map."""
        return self.width // self.kernel**2

    @property
    def latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.device

    @property
    def gate(self) -> Tensor:
        """What a pre-activation must exceed to count (N or scalar, not negative). Says nothing of TopK's rivalry."""
        return torch.zeros((), device=self.encoder.device) if self.threshold is None else self.threshold.clamp(min=0)

    def rows(self, h: Tensor, step: int) -> Tensor:
        """Normalised rows B x P x width of activations B x C x H x W; P is H W, or 1 for a kernel of the whole map."""
        if h.shape[1] != self.channels:
            raise DiffLensError(
                f"SAE for {self.site}: got activations of width {h.shape[1]}, expected {self.channels}."
            )
        if self.kernel > 1 and tuple(h.shape[2:]) != (self.kernel, self.kernel):
            raise DiffLensError(
                f"SAE for {self.site}: got a map of {' x '.join(map(str, h.shape[2:]))}, expected {self.kernel} x "
                f"{self.kernel}, all of which it reads at once. Sample at the size it was trained on."
            )
        rows = self.normalisation.apply(h, step)
        return rows if self.kernel == 1 else rows.transpose(1, 2).flatten(1)[:, None]

    def encode(self, h: Tensor, step: int) -> Latents:
        """Latents (B x P x k) of activations B x C x H x W taken at row `step` of the normalisation."""
        return self.encode_rows(self.rows(h, step), step)

    def encode_rows(self, rows: Tensor, step: int) -> Latents:
        """Latents (B x P x k) of normalised rows B x P x width, taken at row `step` of the normalisation."""
        pre = self.pre_activations(rows, step)
        if self.activation == "topk":
            return top_k(pre, self.k)
        active = pre > self.gate
        return top_k(torch.where(active, pre, 0.0), max(1, int(active.sum(dim=-1).max())))

    def pre_activations(self, rows: Tensor, step: int) -> Tensor:
        """What goes into the activation function: ... x N, of normalised rows ... x width."""
        return F.linear(self.normalisation.modulated(rows, step), self.encoder, self.encoder_bias)

    def decode(self, latents: Latents) -> Tensor:
        """Reconstruction in normalised units, B x P x width."""
        return sparse_decode(latents, self.decoder) + self.decoder_bias

    def reconstruct(self, h: Tensor, step: int) -> Tensor:
        """h^ of activations h, both B x C x H x W."""
        x = self.unflat(self.decode(self.encode(h, step)), h.shape)
        return x * self.normalisation.scale[step] + self.normalisation.mean[step][:, None, None]

    def flat(self, h: Tensor) -> Tensor:
        """Maps B x C x H x W as rows B x P x width."""
        return h.flatten(2).transpose(1, 2) if self.kernel == 1 else h.flatten(1)[:, None]

    def unflat(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Rows B x P x width as maps of `shape`, B x C x H x W."""
        return (rows.transpose(1, 2) if self.kernel == 1 else rows).reshape(shape)

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        threshold = None if self.threshold is None else self.threshold.to(device)
        return replace(self, **moved, threshold=threshold, normalisation=self.normalisation.to(device))


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
    """Write an SAE; `dtype` may be float16 or bfloat16 to halve the file (fp16 only where it holds the numbers)."""
    convert = as_half if dtype == torch.float16 else lambda tensor: tensor.to(dtype)
    tensors = {name: convert(getattr(sae, name)) for name in TENSORS}
    tensors |= {f"normalisation.{name}": getattr(sae.normalisation, name) for name in NORMALISATION}
    if sae.normalisation.modulation is not None:
        tensors["normalisation.modulation"] = sae.normalisation.modulation
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    save_tensors(path, "sae", tensors, {name: getattr(sae, name) for name in SETTINGS} | {"info": dict(sae.info)})


def check_steps(progress: Tensor, scale: Tensor) -> None:
    """Raise `DiffLensError` unless a file's normalisation is of one step or more, and can be divided by."""
    if not progress.numel() or not (scale > 0).all():
        raise DiffLensError("its normalisation has no step, or one of scale 0. The file is damaged.")


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Read an SAE that `save_sae` wrote; weights come back in fp32. Raises `DiffLensError` if it does not fit."""
    statistics = [f"normalisation.{name}" for name in NORMALISATION]
    tensors, info = load_tensors(path, "sae", needs=[*TENSORS, *statistics, "k", "site"])
    with reading(path):
        parts = {name: info[name] for name in SETTINGS if name in info}  # files of version 0.1 hold k and site alone
        parts |= {name: int(parts[name]) for name in ("k", "kernel") if name in parts}
        update = info.get("reads") == "update"  # how version 0.2 told it
        parts["site"] = str(parts["site"]) + (UPDATE if update else "")
        parts |= {"info": dict(info.get("info", {})), "threshold": tensors.get("threshold")}
        parts |= {name: tensors[name].float() for name in TENSORS}
        refuse_whole_numbers(tensors)
        modulation = tensors.get("normalisation.modulation")
        progress, mean, scale = (tensors[name].float() for name in statistics)
        check_steps(progress, scale)
        normalisation = Normalisation(progress, mean, scale, modulation)
        return SparseAutoencoder(**parts, normalisation=normalisation)
