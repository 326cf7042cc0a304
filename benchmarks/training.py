"""SAE training against other trainers, on the same rows with the same optimiser settings.

    python benchmarks/training.py                 both sizes, about 8 minutes
    python benchmarks/training.py --seconds 0     speed only

Speed is the median time of a full step (loss, gradients, clipping, Adam, unit decoder), the trainers taking turns.
Then each trains for equal seconds and is measured on rows it has not seen. Peers that are not installed are left out:
sae-lens, eai-sparsify, dictionary-learning. "dense" is the plain way: dense latents through two 1x1 convolutions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from difflens_core.activations import Activations  # noqa: E402
from difflens_core.sae import State, TrainingOptions, initial_sae, learning_rate_share  # noqa: E402

SIZES = ((1280, 10240), (512, 4096))  # width, latents: SD mid block, P2 mid block
K = 32
BATCH = 1024
LR = 1e-3
TIMED = 9
ROWS = 65_536


@dataclass
class Trainer:
    """step(rows) trains once at the rate its optimiser has; latents(rows) and explain(rows) use what it learned."""

    step: Callable[[Tensor], object]
    optimiser: torch.optim.Optimizer
    reconstruct: Callable[[Tensor], Tensor]
    fires: Callable[[Tensor], Tensor]


def make_rows(width: int, latents: int, count: int, seed: int) -> Tensor:
    """Rows that are sparse by construction: 24 of `latents` / 2 directions with positive amounts, and noise.

    Centred, and scaled to a mean square of 1, as our trainer does with every capture: all trainers get the same.
    """
    directions = F.normalize(torch.randn(latents // 2, width, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(directions), (count, 24), generator=generator)
    amounts = torch.rand(count, 24, generator=generator) + 0.5
    rows = F.embedding_bag(chosen, directions, per_sample_weights=amounts, mode="sum")
    rows += 0.02 * torch.randn(count, width, generator=generator)
    return (rows - directions.mean(dim=0) * 24) / (24 / width * 13 / 12) ** 0.5


def ours(width: int, latents: int, rows: Tensor, device: str, precision: str = "fp32") -> Trainer:
    activations = Activations(rows[:, :, None, None][None], torch.zeros(1), "rows")
    options = TrainingOptions(latents, K, steps=10**9, batch=BATCH, lr=LR, precision=precision)
    state = State(initial_sae(activations, options), options, activations, device)
    norm = state.initial.normalisation.to(device)

    def normal(x: Tensor) -> Tensor:
        return (x - norm.mean[0]) / norm.scale[0]

    def step(x: Tensor) -> None:
        rate = state.optimiser.param_groups[0]["lr"]
        state.step = options.steps // 2 - 1  # in the flat part of its own schedule
        state.options = options.__class__(**{**vars(options), "lr": rate})
        state.train_on(normal(x))

    def active(x: Tensor) -> tuple[Tensor, Tensor]:
        m = state.module
        values, indices = F.linear(normal(x), m.encoder, m.encoder_bias).topk(K)
        return values.relu(), indices

    def reconstruct(x: Tensor) -> Tensor:
        values, indices = active(x)
        out = F.embedding_bag(indices, state.module.decoder, per_sample_weights=values, mode="sum")
        return (out + state.module.decoder_bias) * norm.scale[0] + norm.mean[0]

    def fires(x: Tensor) -> Tensor:
        values, indices = active(x)
        return indices[values > 0].unique()

    return Trainer(step, state.optimiser, reconstruct, fires)


def dense(width: int, latents: int, rows: Tensor, device: str) -> Trainer:
    """Dense latents through 1x1 convolutions, as the paper's reference trains."""
    encoder, decoder = nn.Conv2d(width, latents, 1).to(device), nn.Conv2d(latents, width, 1).to(device)
    with torch.no_grad():
        decoder.weight.copy_(F.normalize(encoder.weight[:, :, 0, 0], dim=1).T[:, :, None, None])
        decoder.bias.zero_()
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(weights, lr=LR)

    def encode(x: Tensor) -> Tensor:
        """Dense latents of rows laid out as 8 x 8 maps."""
        maps = x.view(-1, 8, 8, width).permute(0, 3, 1, 2).contiguous()
        values, indices = encoder(maps).relu().topk(K, dim=1)
        return torch.zeros(len(maps), latents, 8, 8, device=device).scatter(1, indices, values)

    def reconstruct(x: Tensor) -> Tensor:
        return decoder(encode(x)).permute(0, 2, 3, 1).reshape(-1, width)

    def step(x: Tensor) -> None:
        loss = (x - reconstruct(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            w = decoder.weight
            w.grad -= (w.grad * w).sum(dim=0, keepdim=True) * w
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            w.copy_(F.normalize(w, dim=0))

    return Trainer(step, optimiser, reconstruct, lambda x: encode(x).any(dim=3).any(dim=2).any(dim=0).nonzero())


def sparsify(width: int, latents: int, rows: Tensor, device: str) -> Trainer:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if device == "cpu" else "0")
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=K), device=device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)
    idle = torch.zeros(latents, dtype=torch.int64, device=device)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=idle > 100)
        optimiser.zero_grad()
        (out.fvu + out.auxk_loss / 32).backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        idle.add_(1)
        idle[out.latent_indices.flatten()] = 0

    def fires(x: Tensor) -> Tensor:
        out = coder(x)
        return out.latent_indices[out.latent_acts > 0].unique()

    return Trainer(step, optimiser, lambda x: coder(x).sae_out, fires)


def dictionary_learning(width: int, latents: int, rows: Tensor, device: str) -> Trainer:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=width, dict_size=latents, k=K, layer=0, lm_name="rows", lr=LR, device=device
    )
    count = iter(range(10**9))
    return Trainer(
        lambda x: trainer.update(next(count), x),
        trainer.optimizer,
        trainer.ae,
        lambda x: trainer.ae.encode(x).any(dim=0).nonzero(),
    )


def sae_lens(width: int, latents: int, rows: Tensor, device: str) -> Trainer:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=latents, k=K, device=device))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=BATCH, lr=LR, lr_end=LR, device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter([]))
    return Trainer(trainer.step, trainer.optimizer, sae, lambda x: sae.encode(x).to_dense().any(dim=0).nonzero())


MAKERS = {
    "ours": ours,
    "dictionary_learning": dictionary_learning,
    "SAELens": sae_lens,
    "dense": dense,
    "eai-sparsify": sparsify,
}


def installed(width: int, latents: int, rows: Tensor, device: str) -> dict[str, Trainer]:
    """Trainers of all libraries that can be imported."""
    trainers = {}
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        try:
            trainers[name] = make(width, latents, rows, device)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return trainers


def timed(step: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def train_for(seconds: float, trainer: Trainer, step_time: float, rows: Tensor) -> int:
    """Train for so many seconds with the rate warming up and falling; returns the steps done."""
    total = max(1, int(seconds / step_time))
    generator = torch.Generator().manual_seed(7)
    began = time.perf_counter()
    for step in range(total):
        for group in trainer.optimiser.param_groups:
            group["lr"] = LR * learning_rate_share(step, total)
        trainer.step(rows[torch.randint(len(rows), (BATCH,), generator=generator)])
        if time.perf_counter() - began > 1.2 * seconds:
            break
    return step + 1


@torch.no_grad()
def quality(trainer: Trainer, rows: Tensor, latents: int) -> tuple[float, float]:
    """Explained variance and dead share on unseen rows."""
    error, fired = 0.0, torch.zeros(latents, dtype=torch.bool)
    for part in rows.split(BATCH):
        error += float((part - trainer.reconstruct(part)).square().sum())
        fired[trainer.fires(part).flatten().cpu()] = True
    variance = float((rows - rows.mean(dim=0)).square().sum())
    return 1 - error / variance, 1 - float(fired.float().mean())


def rows(seconds: float = 0, device: str = "cpu") -> list[dict]:
    """A row a size and peer; times in seconds a step, ratio = peer's time over ours."""
    table = []
    for width, latents in SIZES:
        data = make_rows(width, latents, ROWS, seed=1).to(device)
        trainers = installed(width, latents, data, device)
        times: dict[str, list[float]] = {name: [] for name in [*trainers, "encoder product"]}
        weight = torch.randn(latents, width, device=device)
        for turn in range(TIMED + 2):
            batch = data[turn * BATCH : (turn + 1) * BATCH]
            for name, trainer in trainers.items():
                times[name].append(timed(lambda t=trainer: t.step(batch), device))  # noqa: B023
            times["encoder product"].append(timed(lambda: F.linear(batch, weight), device))  # noqa: B023
        median = {name: statistics.median(values[2:]) for name, values in times.items()}
        learned = {}
        if seconds:
            unseen = make_rows(width, latents, 8 * BATCH, seed=2).to(device)
            for name in trainers:
                torch.manual_seed(0)
                trainer = MAKERS[name](width, latents, data, device)
                done = train_for(seconds, trainer, median[name], data)
                learned[name] = (*quality(trainer, unseen, latents), done)
                print(
                    f"  {name}: {done} steps, explained {learned[name][0]:.4f}, dead {learned[name][1]:.1%}", flush=True
                )
        for name in median:
            if name != "ours":
                table.append(
                    {
                        "name": "SAE training step", "size": f"d={width} N={latents} k={K} batch={BATCH}",
                        "ours": median["ours"], "peer": median[name], "peer_name": name,
                        "ratio": median[name] / median["ours"],
                        "learned": {who: learned[who] for who in ("ours", name) if who in learned},
                    }
                )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="training time of the comparison of quality")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for row in rows(options.seconds, options.device):
        print(
            f"{row['size']:32} {row['peer_name']:20} ours {BATCH / row['ours']:8.0f}/s, "
            f"peer {BATCH / row['peer']:8.0f}/s, ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
