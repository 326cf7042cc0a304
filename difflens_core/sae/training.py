"""Training a TopK SAE on captured activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..activations import Activations
from ..files import DiffLensError, read_content, replacing
from ..processes import process
from .autoencoder import TENSORS, SparseAutoencoder, fit_normalisation
from .loss import ACTIVATIONS, PRECISIONS, BatchLoss, TrainingOptions, over_processes
from .quality import Quality, measure_sae


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
    if options.batch % process()[1]:
        raise DiffLensError(f"Train SAE: a batch of {options.batch} cannot be shared by {process()[1]} processes.")
    if not 1 <= options.k <= options.latents:
        raise DiffLensError(f"Train SAE: k is {options.k}, expected 1 to {options.latents}, the number of latents.")
    generator = torch.Generator().manual_seed(options.seed)
    decoder = F.normalize(torch.randn(options.latents, activations.width, generator=generator), dim=1)
    zeros = torch.zeros(options.latents), torch.zeros(activations.width)
    normalisation = fit_normalisation(activations)
    return SparseAutoencoder(decoder.clone(), zeros[0], decoder, zeros[1], normalisation, options.k, activations.site)


def train_sae(
    activations: Activations,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008 (frozen)
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
    Raises `DiffLensError` if the weights come to be NaN or infinite.
    """
    sae = initial_sae(activations, options)
    state = State(sae, options, activations, device)
    if checkpoint and checkpoint.exists():
        state.load(checkpoint)
    every = max(1, options.steps // 20)
    rank, processes = process()
    file = checkpoint if rank == 0 else None
    try:
        while state.step < options.steps:
            picks = activations.draw(options.batch, options.seed, state.step)[rank::processes]
            loss = state.train_on(training_rows(activations, sae, picks).to(device))
            due, kept = state.step % every == 0 or state.step == options.steps, state.step % 200 == 0
            if due or kept:
                state.check()
            on_step(state.step, loss, measure_sae(state.sae(), held_out) if held_out and due else None)
            if file and kept:
                state.save(file)
    except BaseException:
        if file and state.whole:
            state.save(file)
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
        self.whole = True  # not amid an update of the weights, where Ctrl+C may strike as well

    def train_on(self, rows: Tensor) -> Tensor:
        """One optimiser step on normalised rows (B x C); returns the loss."""
        options, decoder = self.options, self.module.decoder
        for group in self.optimiser.param_groups:
            group["lr"] = options.lr * learning_rate_share(self.step, options.steps)
        loss, fired, smallest = self.wrapped(rows, self.idle > options.dead_after)
        self.optimiser.zero_grad()
        loss.backward()
        assert decoder.grad is not None
        self.whole = False
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
        self.whole = True
        return over_processes(loss.detach()) / process()[1]

    def check(self) -> None:
        """Raise `DiffLensError` if the weights are no numbers any more; they are not saved then."""
        if not all(bool(torch.isfinite(weight).all()) for weight in self.module.parameters()):
            self.whole = False
            raise DiffLensError(
                f"the training went astray: at step {self.step} the weights are NaN or infinite. Take a smaller "
                f"learning rate than {self.options.lr:g}."
            )

    def sae(self) -> SparseAutoencoder:
        """The SAE as it is now, on the CPU."""
        weights = {name: getattr(self.module, name).detach().cpu().clone() for name in TENSORS}
        threshold = self.threshold.cpu() if self.options.activation == "batchtopk" else None
        return replace(self.initial, **weights, activation=self.options.activation, threshold=threshold)

    def save(self, path: Path) -> None:
        """Write everything to `path`, whole or not at all."""
        parts = {name: getattr(self, name) for name in ("data", "idle", "threshold", "step")}
        weights, optimiser = self.module.state_dict(), self.optimiser.state_dict()
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"options": repr(self.options), "weights": weights, "optimiser": optimiser} | parts, file)

    def load(self, path: Path) -> None:
        """Go on from `path`.

        Raises `DiffLensError` if it is damaged, or was begun on other activations or with other options.
        """
        saved = read_content(path)
        if not isinstance(saved, dict):
            raise DiffLensError(f"{path}: holds no training that was begun. Delete it, or use another name.")
        for what, now in (("options", repr(self.options)), ("data", self.data)):
            if not isinstance(saved.get(what), str) or saved[what] != now:
                raise DiffLensError(
                    f"{path.name}: was begun with other {what} ({saved.get(what)}), not {now}. Delete it or use those."
                )
        try:
            self.module.load_state_dict(saved["weights"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.idle, self.threshold = (saved[name].to(self.device) for name in ("idle", "threshold"))
            self.step = int(saved["step"])
        except Exception as error:  # what is missing or changed may bring up anything
            raise DiffLensError(f"{path}: is damaged. Delete it, and training begins anew.") from error


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, linear decay over the last half."""
    return min(1.0, (step + 1) / max(1, steps // 20), (steps - step) / max(1, steps // 2))
