"""Training a TopK SAE on captured activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .activations import Activations
from .files import DiffLensError
from .sae import TENSORS, SparseAutoencoder, fit_normalisation
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


@dataclass(frozen=True)
class Quality:
    """How well an SAE explains activations.

    fvu: fraction of variance unexplained, ||x - x^||^2 / ||x - mean||^2, in normalised units; l0: active latents a
    position; dead: share of latents that never fired on these activations.
    """

    fvu: float
    l0: float
    dead: float


def hold_out(activations: Activations) -> tuple[Activations, Activations]:
    """The pictures to train on, and the last eighth (at least one) to measure the SAE on."""
    if activations.pictures < 2:
        raise DiffLensError("got one picture, expected at least 2, one to train on and one to measure by.")
    kept = activations.pictures - max(1, activations.pictures // 8)
    return activations.part(0, kept), activations.part(kept, activations.pictures)


def training_rows(activations: Activations, sae: SparseAutoencoder, picks: Tensor) -> Tensor:
    """Normalised rows (len(picks) x C) of the flat (step, picture, position) indices `picks`."""
    step = picks // (activations.pictures * activations.positions)
    rows = activations.rows(picks).float()
    return (rows - sae.normalisation.mean[step]) / sae.normalisation.scale[step, None]


def initial_sae(activations: Activations, options: TrainingOptions) -> SparseAutoencoder:
    """Untrained SAE: random unit directions, the encoder equal to the decoder."""
    for name, known in (("activation", ACTIVATIONS), ("precision", PRECISIONS)):
        if getattr(options, name) not in known:
            raise DiffLensError(f"Train SAE: {name} is {getattr(options, name)!r}, expected one of {', '.join(known)}.")
    if options.batch % processes():
        raise DiffLensError(f"Train SAE: a batch of {options.batch} cannot be shared by {processes()} processes.")
    if not 1 <= options.k <= options.latents:
        raise DiffLensError(f"Train SAE: k is {options.k}, expected 1 to {options.latents}, the number of latents.")
    generator = torch.Generator().manual_seed(options.seed)
    decoder = F.normalize(torch.randn(options.latents, activations.width, generator=generator), dim=1)
    zeros = torch.zeros(options.latents), torch.zeros(activations.width)
    normalisation = fit_normalisation(activations)
    return SparseAutoencoder(decoder.clone(), zeros[0], decoder, zeros[1], normalisation, options.k, activations.site)


class BatchLoss(nn.Module):
    """FVU of a batch plus the AuxK loss (Gao et al. 2024, arXiv 2406.04093, A.2) as a module with the SAE's weights.

    A module because DistributedDataParallel wraps one. With several processes each sees its own rows of the batch,
    and the mean over processes of the loss, and so of its gradients, is that of the whole batch.
    """

    def __init__(self, sae: SparseAutoencoder, options: TrainingOptions):
        super().__init__()
        self.options = options
        for name in TENSORS:
            self.register_parameter(name, nn.Parameter(getattr(sae, name).clone()))

    def forward(self, rows: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, which latents fired (N, bool) and the smallest active value, for rows B x C; dead: N, bool."""
        o = self.options
        with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16, enabled=o.precision == "bf16"):
            pre = F.linear(rows, self.encoder, self.encoder_bias)
        active = self.encode(rows, batch_top_k(pre, o.k) if o.activation == "batchtopk" else top_k_active(pre, o.k))
        rebuilt = decode_active(active, self.decoder) + self.decoder_bias
        scale = processes() / total_variance(rows)
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


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


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
        parts = [torch.empty_like(values) for _ in range(processes())]
        dist.all_gather(parts, values)
        values = torch.cat(parts)
    return values.topk(count * processes()).values[-1]


def train_sae(
    activations: Activations,
    options: TrainingOptions = TrainingOptions(),
    on_step: Callable[[int, Tensor, Quality | None], None] = lambda step, loss, quality: None,
    checkpoint: Path | None = None,
    held_out: Activations | None = None,
    device: torch.device | str = "cpu",
) -> SparseAutoencoder:
    """Train an SAE with Adam (warm-up, linear decay, clipped gradients, unit decoder rows).

    `on_step(step, loss, quality)` is called after every optimiser step and may raise to cancel; loss is a scalar on
    `device`, quality is that on `held_out`, twenty times a training, else None. With `checkpoint`, state is saved
    there every 200 steps and on cancel, and an existing file is gone on from, with the same result.
    Under torchrun (an initialised process group) the processes share each batch; all return the same SAE.
    """
    sae = initial_sae(activations, options)
    state = State(sae, options, activations, device)
    if checkpoint and checkpoint.exists():
        state.load(checkpoint)
    every = max(1, options.steps // 20)
    rank = dist.get_rank() if dist.is_initialized() else 0
    writes = checkpoint and rank == 0
    try:
        while state.step < options.steps:
            picks = activations.draw(options.batch, options.seed, state.step)[rank :: processes()]
            loss = state.train_on(training_rows(activations, sae, picks).to(device))
            due = held_out is not None and (state.step % every == 0 or state.step == options.steps)
            on_step(state.step, loss, measure_sae(state.sae(), held_out) if due else None)
            if writes and state.step % 200 == 0:
                state.save(checkpoint)
    except BaseException:
        if writes:
            state.save(checkpoint)
        raise
    return replace(state.sae(), info={"training": {**vars(options), "pictures": activations.pictures}})


def training_bytes(options: TrainingOptions, width: int) -> int:
    """Memory that training takes: weights, gradients and two moments of each, and the pre-activations of a batch."""
    return 4 * (4 * 2 * options.latents * width + 2 * options.batch * options.latents)


class State:
    """All that changes while an SAE is trained, and its file."""

    def __init__(
        self, sae: SparseAutoencoder, options: TrainingOptions, activations: Activations, device: torch.device | str
    ):
        self.initial, self.options, self.device = sae, options, device
        self.data = f"{activations.site}, {activations.rows_in_all} rows of {activations.width}"
        self.module = BatchLoss(sae, options).to(device)
        self.wrapped = DistributedDataParallel(self.module) if dist.is_initialized() else self.module
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=options.lr, fused=True)
        self.idle = torch.zeros(options.latents, dtype=torch.int64, device=device)
        self.threshold = torch.zeros((), device=device)
        self.step = 0

    def train_on(self, rows: Tensor) -> Tensor:
        """One optimiser step on normalised rows (B x C); returns the loss."""
        options, decoder = self.options, self.module.decoder
        for group in self.optimiser.param_groups:
            group["lr"] = options.lr * learning_rate_share(self.step, options.steps)
        loss, fired, smallest = self.wrapped(rows, self.idle > options.dead_after)
        self.optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            # Rows keep their length: what would only change it must not fill the optimiser's memory.
            decoder.grad.addcmul_(decoder, torch.linalg.vecdot(decoder.grad, decoder)[:, None], value=-1)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimiser.step()
            decoder.div_(torch.linalg.vector_norm(decoder, dim=1, keepdim=True))
            self.idle.add_(1).masked_fill_(over_processes(fired.int(), "MAX").bool(), 0)
            smallest = over_processes(smallest, "MIN")
            self.threshold = torch.lerp(self.threshold, smallest, 1 / min(self.step + 1, 100))
        self.step += 1
        return over_processes(loss.detach()) / processes()

    def sae(self) -> SparseAutoencoder:
        """The SAE as it is now, on the CPU."""
        weights = {name: getattr(self.module, name).detach().cpu().clone() for name in TENSORS}
        threshold = self.threshold.cpu() if self.options.activation == "batchtopk" else None
        return replace(self.initial, **weights, activation=self.options.activation, threshold=threshold)

    def save(self, path: Path) -> None:
        """Write everything to `path`, whole or not at all."""
        parts = {name: getattr(self, name) for name in ("data", "idle", "threshold", "step")}
        weights, optimiser = self.module.state_dict(), self.optimiser.state_dict()
        temporary = path.with_suffix(".tmp")
        torch.save({"options": repr(self.options), "weights": weights, "optimiser": optimiser} | parts, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on from `path`. Raises `DiffLensError` if it was begun on other activations or with other options."""
        saved = torch.load(path, weights_only=True, map_location=self.device)
        for what, now in (("options", repr(self.options)), ("data", self.data)):
            if saved.get(what) != now:
                raise DiffLensError(
                    f"{path.name}: was begun with other {what} ({saved.get(what)}), not {now}. Delete it or use those."
                )
        self.module.load_state_dict(saved["weights"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.idle, self.threshold, self.step = saved["idle"], saved["threshold"], saved["step"]


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, linear decay over the last half."""
    return min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / max(1, steps // 2))


@torch.no_grad()
def measure_sae(sae: SparseAutoencoder, activations: Activations) -> Quality:
    """Quality on `activations` (use pictures that the SAE was not trained on)."""
    error = variance = active = 0.0
    fired = torch.zeros(sae.latents, dtype=torch.bool)
    rows_of_step = activations.pictures * activations.positions // sae.kernel**2
    for s, progress in enumerate(activations.progress):
        step = sae.normalisation.step_at(float(progress))
        total = torch.zeros(sae.width, dtype=torch.float64)
        for _, values in activations.batches(s):
            rows = sae.rows(values, step)
            latents = sae.encode_rows(rows)
            error += float((rows - sae.decode(latents)).double().square().sum())
            variance += float(rows.double().square().sum())
            total += rows.double().sum(dim=(0, 1))
            active += float((latents.values > 0).sum())
            fired[latents.indices[latents.values > 0]] = True
        variance -= float(total.square().sum()) / rows_of_step
    return Quality(
        error / variance, active / (rows_of_step * len(activations.progress)), 1 - float(fired.float().mean())
    )
