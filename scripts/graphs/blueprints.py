"""Subgraphs that ComfyUI offers among its nodes: ways of several of our nodes, as one."""

from __future__ import annotations

from .graph import Graph, Inlet, Subgraph
from .pieces import find_features, steer


def find_and_debias() -> Subgraph:
    """From a model and a prompt to the model that draws a fair mix, as workflow 02 goes."""
    inside = Graph("DiffLens find and debias", first_id=201)
    inside.group("1 Draw and record")
    model, attribute, classifier = Inlet("model"), Inlet("attribute", "presentation"), Inlet("classifier")
    drawn = {
        "model": model, "positive": Inlet("positive"), "negative": Inlet("negative"), "vae": Inlet("vae"),
        "latent_image": Inlet("latent_image"), "classifier": classifier, "cfg": Inlet("cfg", 1.0),
        "sampler_name": "euler", "scheduler": "simple", "steps": Inlet("steps", 20),
    }  # fmt: skip
    captured = inside.add(
        "DiffLensCapture", None, **drawn, pictures=Inlet("pictures", 256), seed=0, site=Inlet("site", "middle_block"),
        start_percent=0.0, end_percent=1.0, dtype="float16", save_as="", attribute=attribute,
        per_class=Inlet("per_class", 100), twins=1,
    )  # fmt: skip
    labels = inside.add("DiffLensClassify", None, images=captured[1], classifier=classifier, attribute=attribute)
    found = find_features(
        inside, model, captured, labels, latents=1024, steps=Inlet("training", 1500), batch_size=2048, save_as=""
    )  # fmt: skip
    inside.group("4 Find the strengths, and steer")
    calibrated = inside.add(
        "DiffLensCalibrate", None, **drawn, recipe=found[0], target=Inlet("target", "uniform"),
        budget=Inlet("calibration", 640), tolerance=0.02, clear=0.999, only_where_needed=False, seed=1,
        spare_others=True,
    )  # fmt: skip
    steered = steer(inside, None, model, calibrated[0], Inlet("target", "uniform"))
    return Subgraph(
        inside,
        (
            "model", "positive", "negative", "vae", "latent_image", "classifier", "attribute", "target", "site",
            "pictures", "per_class", "training", "calibration", "steps", "cfg",
        ),
        {"model": steered[0], "recipe": calibrated[0], "was the mix met": calibrated[2], "targets": steered[1]},
        "Finds what decides an attribute in a model, and puts out the model that draws the mix asked for. It draws "
        "pictures, learns their features, and calibrates: minutes for the avatars, an evening for a large model.",
        ("fairness", "bias", "gender", "race", "skin", "age", "diversity", "representation", "inclusive", "debias"),
    )  # fmt: skip
