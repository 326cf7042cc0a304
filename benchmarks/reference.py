"""The reference code's way to sample beside ours, on the avatars in a real ComfyUI: fairness, success and time.

    python scripts/demo.py              once before, to get the environment and ComfyUI
    python benchmarks/reference.py      128 pictures

Every row draws the same pictures without and with the shipped recipe. *one pass* is a stock sampler behind Steer; *two
passes* is Reference Sampler, which takes the clean picture from the steered pass and the direction from the unsteered.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from graphs import Graph, Link, Node, load_classifier, load_model, steer, to_api  # noqa: E402
from host import Server  # noqa: E402

ATTRIBUTES = ("presentation", "age", "skin_tone")
STEPS, SEED = 20, 90_002


class Run(Graph):
    """Pictures of the avatars by SamplerCustom, steered or not."""

    def __init__(self, pictures: int, attribute: str):
        super().__init__("reference")
        self.group("all")
        self.model = load_model(self)
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=pictures)
        recipe = self.add("DiffLensLoadRecipe", recipe_name=f"avatars_{attribute}.safetensors")
        self.steered = steer(self, None, self.model[0], recipe[0])
        self.attribute = attribute

    def draw(self, model: Link, eta: float | None) -> Node:
        """Pictures by euler, or by Reference Sampler with that eta."""
        sampler = (
            self.add("KSamplerSelect", sampler_name="euler") if eta is None
            else self.add("DiffLensReferenceSampler", eta=eta)
        )  # fmt: skip
        sigmas = self.add("BasicScheduler", model=self.model[0], scheduler="simple", steps=STEPS, denoise=1.0)
        drawn = self.add(
            "SamplerCustom", model=model, add_noise=True, noise_seed=SEED, cfg=1.0, positive=self.model[1],
            negative=self.model[1], sampler=sampler[0], sigmas=sigmas[0], latent_image=self.latent[0],
        )  # fmt: skip
        return self.add("VAEDecode", samples=drawn[0], vae=self.model[2])

    def report(self, before: Node, after: Node) -> Node:
        classifier = load_classifier(self)
        report = self.add(
            "DiffLensReport", classifier=classifier[0], attribute=self.attribute, target="uniform", before=before[0],
            after=after[0], targets=self.steered[1],
        )  # fmt: skip
        return self.add("PreviewAny", source=report[1])


def measure(server: Server, pictures: int, attribute: str, eta: float | None) -> tuple[dict, float]:
    """The report on one way to sample, and the seconds that the steered pictures took."""
    graph = Run(pictures, attribute)
    before = graph.draw(graph.model[0], eta)
    graph.add("PreviewImage", images=before[0])
    server.run(to_api(graph))  # what is drawn here is kept and does not count below
    after = graph.draw(graph.steered[0], eta)
    graph.add("PreviewImage", images=after[0])
    began = time.perf_counter()
    server.run(to_api(graph))
    seconds = time.perf_counter() - began
    shown = graph.report(before, after)
    entry = server.run(to_api(graph))
    return json.loads(entry["outputs"][str(shown.id)]["text"][0]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    options = parser.parse_args()
    print(f"n = {options.pictures}, {STEPS} steps, seed {SEED}")
    print(f"{'':14s}{'':24s}FD before  after  success  change  seconds")
    with Server() as server:
        for attribute in ATTRIBUTES:
            for name, eta in (("one pass", None), ("two passes, eta 0", 0.0), ("two passes, eta 1", 1.0)):
                numbers, seconds = measure(server, options.pictures, attribute, eta)
                before, after = numbers["before"]["fd"], numbers["after"]
                print(
                    f"{attribute:14s}{name:24s}{before:9.3f}{after['fd']:7.3f}{after['success']:9.3f}"
                    f"{numbers['pixel_change']:8.3f}{seconds:9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
