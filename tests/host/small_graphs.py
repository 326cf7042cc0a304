"""Graphs for the host tests, shipped ones and small ones on the avatars, and what came out of a run."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
import torch
from graphs import FOLDER, Graph, Link, Node, load_classifier, load_model, sampler, steer, to_api
from host import HostError, Server
from PIL import Image
from safetensors.torch import load_file, save_file

AVATARS = FOLDER.parent / "models" / "avatars"
# The shipped workflows.
NAMES = (
    "00 start DiffLens, fairness and diversity",
    "01 debias the avatars", "02 find the bias features, train an SAE", "03 dose response",
    "04 debias a prompt, stereotypes of occupations",
    "05 paper unconditional", "06 paper Stable Diffusion", "07 three attributes at once", "08 where is it decided",
    "09 which features count", "10 why does it not work", "11 your own model",
)  # fmt: skip
OF_SCENES = "12 any size"  # whose model is not in the registry's archive, so that it is not either


def api_file(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name.replace(' ', '_')}.json").read_text(encoding="utf-8"))


def find(prompt: dict, class_type: str, **inputs: object) -> str:
    """Id of the one node of that type with those inputs."""
    (found,) = [i for i, n in prompt.items() if n["class_type"] == class_type and inputs.items() <= n["inputs"].items()]
    return found


class Avatars(Graph):
    """The avatars, their classifier, and a batch of pictures to draw in four steps."""

    def __init__(self, pictures: int = 2, size: int = 64, model: str = "avatars"):
        super().__init__("avatars")
        self.group("all")
        self.model, self.classifier = load_model(self, f"{model}.safetensors"), load_classifier(self)
        self.latent = self.add("EmptyLatentImage", width=size, height=size, batch_size=pictures)

    def recipe(self, name: str = "avatars_age") -> Link:
        return self.add("DiffLensLoadRecipe", recipe_name=f"{name}.safetensors")[0]

    def sae(self) -> Link:
        return self.add("DiffLensLoadSAE", sae_name="avatars.safetensors")[0]

    def steer(self, recipe: Link, model: Link | None = None, **settings: object) -> Node:
        node = steer(self, None, model or self.model[0], recipe)
        node.inputs |= settings
        return node

    def draw(self, model: Link | None = None, seed: int = 3) -> Node:
        drawn = sampler(self, None, model or self.model[0], self.model[1], self.latent, seed)
        drawn.inputs["steps"] = 4
        return drawn

    def draw_steered(self, recipe: str = "avatars_age", **settings: object) -> Node:
        return self.draw(self.steer(self.recipe(recipe), **settings)[0])

    def pictures(self, drawn: Node) -> Node:
        return self.add("VAEDecode", samples=drawn[0], vae=self.model[2])

    def save(self, drawn: Node) -> Node:
        return self.add("SaveLatent", samples=drawn[0], filename_prefix="latents/test")

    def show(self, source: Link) -> Node:
        return self.add("PreviewAny", source=source)

    def capture(self, **settings: object) -> Node:
        inputs = {"pictures": 4, "steps": 3, "seed": 0, "site": "middle_block"}
        return self.add(
            "DiffLensCapture", model=self.model[0], positive=self.model[1], latent_image=self.latent[0],
            vae=self.model[2], sampler_name="euler", scheduler="simple", **{**inputs, **settings},
        )  # fmt: skip

    def labels(self, captured: Node, attribute: str = "presentation") -> Link:
        node = self.add(
            "DiffLensClassify", images=captured[1], classifier=self.classifier[0], attribute=attribute
        )  # fmt: skip
        return node[0]

    def train(self, captured: Node, steps: int, save_as: str = "") -> Node:
        return self.add(
            "DiffLensTrainSAE", activations=captured[0], latents=64, k=8, steps=steps, batch_size=64,
            learning_rate=0.001, seed=0, save_as=save_as,
        )  # fmt: skip

    def attribute(self, captured: Node, sae: Link, model: Link | None = None) -> Node:
        """From records and an SAE by probes to a recipe for presentation."""
        labels = self.labels(captured)
        probes = self.add("DiffLensTrainProbes", activations=captured[0], sae=sae, labels=labels)
        return self.add(
            "DiffLensAttribute", model=model or self.model[0], activations=captured[0], sae=sae, probes=probes[0],
            labels=labels, method="contrastive", features_per_class=5,
        )  # fmt: skip

    def experiment(self, type: str, **settings: object) -> Node:
        inputs = {"steps": 3, "sampler_name": "euler", "scheduler": "simple", "seed": 0}
        return self.add(
            type, model=self.model[0], positive=self.model[1], latent_image=self.latent[0], vae=self.model[2],
            classifier=self.classifier[0], **{**inputs, **settings},
        )  # fmt: skip

    def report(
        self, before: Node, after: Node | None = None, attribute: str = "age", target: str = "uniform", **more: object
    ) -> Node:  # fmt: skip
        more |= {"after": after[0]} if after else {}
        return self.add(
            "DiffLensReport", classifier=self.classifier[0], attribute=attribute, target=target, before=before[0],
            **more,
        )  # fmt: skip


def diagnose(graph: Avatars, recipe: str, **settings: object) -> Node:
    return graph.experiment(
        "DiffLensDiagnose", recipe=graph.recipe(recipe), sae=graph.sae(),
        **{"pictures": 4, "scan_sites": False, **settings},
    )  # fmt: skip


def foreign_sae(server: Server, name: str) -> None:
    """An SAE as sparsify writes it, in a folder of the user's."""
    folder = server.base / "models" / "difflens_saes" / name
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": torch.ones(8, 256), "encoder.bias": torch.ones(8)}
    tensors |= {"W_dec": torch.ones(8, 256), "b_dec": torch.ones(256)}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text('{"expansion_factor": 32, "num_latents": 8, "k": 2, "d_in": 256}')


# --- what came out ---


def latents(server: Server, entry: dict, node: Node) -> torch.Tensor:
    (reference,) = entry["outputs"][str(node.id)]["latents"]
    return load_file(server.output_dir / reference["subfolder"] / reference["filename"])["latent_tensor"]


def text_of(entry: dict, node: Node | str) -> str:
    """What a node, or one of that id, shows."""
    (text,) = entry["outputs"][node if isinstance(node, str) else str(node.id)]["text"]
    return text


def image_of(server: Server, entry: dict, node: Node | str) -> np.ndarray:
    """The picture of a node, or of one of that id."""
    (reference,) = entry["outputs"][node if isinstance(node, str) else str(node.id)]["images"]
    return np.asarray(Image.open(io.BytesIO(server.get_image(reference))).convert("RGB"))


# --- runs that end early ---


def cancel_in(server: Server, graph: Graph, node: Node, after: int = 2) -> None:
    """Queue the graph and cancel it once `node` reports that much progress."""
    running = threading.Event()

    def watch(nodes: dict) -> None:
        state = nodes.get(str(node.id))
        if state and state["state"] == "running" and after <= state["value"] < state["max"]:
            running.set()

    prompt_id = server.queue(to_api(graph))
    canceller = threading.Thread(target=lambda: running.wait(120) and server.interrupt(prompt_id))
    canceller.start()
    with pytest.raises(HostError, match=f"interrupted in {node.type}"):
        server.wait(prompt_id, timeout=180, on_progress=watch)
    canceller.join()


def refusal(server: Server, graph: Graph) -> str:
    """The one clear sentence with which a graph of our nodes ends."""
    with pytest.raises(HostError) as caught:
        server.run(to_api(graph))
    message = str(caught.value)
    assert "DiffLensError: " in message and "\n" not in message and "Traceback" not in message
    return message
