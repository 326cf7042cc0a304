"""Train an SAE on a store of activations, on one device or many.

    python scripts/train_sae.py STORE OUT.safetensors --latents 4096 --k 32 --steps 20000
    torchrun --nproc-per-node 8 scripts/train_sae.py STORE OUT.safetensors ...

STORE is a folder that Capture Activations wrote. Processes share each batch; the SAE is the one that a single process
would train. State is kept in OUT.checkpoint every 200 steps: run the same command again after an interruption.
Needs an environment with torch, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from difflens_core.activations import open_store  # noqa: E402
from difflens_core.files import DiffLensError  # noqa: E402
from difflens_core.processes import own_device, together  # noqa: E402
from difflens_core.sae import (  # noqa: E402
    Quality,
    TrainingOptions,
    hold_out,
    measure_sae,
    save_sae,
    train_sae,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--site", default="", help="which site of the store; the first if left out")
    for option in fields(TrainingOptions):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    return parser.parse_args()


def main() -> None:
    given, device = vars(parse()), own_device()
    options = TrainingOptions(**{option.name: given[option.name] for option in fields(TrainingOptions)})
    train, held_out = hold_out(open_store(given["store"]).activations(given["site"]))

    def report(step: int, loss: torch.Tensor, quality: Quality | None) -> None:
        if quality:
            print(f"{step}/{options.steps} loss {float(loss):.4f} held out: {asdict(quality)}", flush=True)

    checkpoint = given["out"].with_suffix(".checkpoint")
    with together(device) as leads:
        sae = train_sae(train, options, report, checkpoint, held_out if leads else None, device)
        if leads:
            info = {**sae.info, "held_out": asdict(measure_sae(sae, held_out))}
            save_sae(given["out"], replace(sae, info=info))
            checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except DiffLensError as error:
        sys.exit(str(error))
