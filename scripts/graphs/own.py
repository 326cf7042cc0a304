"""The whole way to a recipe for a model of one's own."""

from __future__ import annotations

from .graph import Graph
from .pieces import find_features, measure, sampler, steer
from .sources import FAIRFACE, SD15, YUNET, bring

ATTRIBUTE = "gender"  # of FairFace


def your_own_model() -> Graph:
    graph = Graph("11 your own model")
    graph.group("Start here")
    graph.note(
        "# A recipe for a model of your own\n\n"
        "Bring three files:\n\n"
        "- your checkpoint, in *models/checkpoints/*; here SD 1.5\n"
        f"{bring(FAIRFACE, 'FairFace')}"
        f"{bring(YUNET, 'YuNet, which finds the faces')}\n"
        "Choose your checkpoint, write the prompts whose pictures you want fair, and press **Run**. It takes an "
        "evening on a small card. What is captured and trained is kept: cancel when you like, and go on later.\n\n"
        "1. **Capture** draws pictures of the prompts until both classes have 100, and records them\n"
        "2. **Train SAE** takes the records apart into features\n"
        "3. **Attribute Features** finds those that decide the attribute\n"
        "4. **Calibrate** finds the strength, on pictures\n"
        "5. **Steer** draws other pictures with the recipe, and the report says what changed\n\n"
        "For SDXL or Flux, and if too few pictures change, read *A model of your own* in the docs (Models): it says "
        "what to change, and how to find the site.\n\n"
        "An attribute is what a classifier sees in a picture, not what a person is."
    )
    graph.group("1 Draw and record")
    model = graph.add("CheckpointLoaderSimple", "Your model", ckpt_name=SD15)
    classifier = graph.add(
        "DiffLensLoadClassifier", None, classifier_name=FAIRFACE,
        face_detector=YUNET,
    )  # fmt: skip
    prompts = "a photo of the face of a doctor\na photo of the face of a nurse"
    positive = graph.add("DiffLensPrompts", "Your prompts, one a line", text=prompts, clip=model[1])
    negative = graph.add("CLIPTextEncode", "What to guide away from", text="", clip=model[1])
    batch = graph.add("EmptyLatentImage", "Size, and pictures at once", width=512, height=512, batch_size=4)
    graph.column()
    drawn = {
        "model": model[0], "positive": positive[0], "negative": negative[0], "cfg": 7.0, "latent_image": batch[0],
        "vae": model[2], "sampler_name": "euler", "scheduler": "simple",
    }  # fmt: skip
    captured = graph.add(
        "DiffLensCapture", None, **drawn, pictures=400, steps=20, seed=0, site="middle_block", start_percent=0.0,
        end_percent=1.0, dtype="float16", save_as="my_model", classifier=classifier[0], attribute=ATTRIBUTE,
        per_class=100, twins=1,
    )  # fmt: skip
    labels = graph.add("DiffLensClassify", None, images=captured[1], classifier=classifier[0], attribute=ATTRIBUTE)
    found = find_features(
        graph, model[0], captured, labels, latents=5120, steps=4000, batch_size=4096, save_as="my_model"
    )
    graph.group("4 Find the strength")
    calibrated = graph.add(
        "DiffLensCalibrate", None, **drawn, classifier=classifier[0], recipe=found[0], target="uniform", budget=640,
        tolerance=0.02, clear=0.999, only_where_needed=False, steps=20, seed=1, spare_others=False,
    )  # fmt: skip
    graph.add("PreviewAny", "Was the mix met?", source=calibrated[2])
    graph.add(
        "DiffLensSaveRecipe", None, recipe=calibrated[0], name="my_model_gender", author="", licence="", model_name=""
    )
    graph.group("5 Steer other pictures by it")
    steered = steer(graph, None, model[0], calibrated[0])
    graph.column()
    pair = [
        sampler(graph, title, source, positive[0], batch, 7, negative[0], 7.0)
        for title, source in (("Before: as the model likes", model[0]), ("After: steered", steered[0]))
    ]
    graph.column()
    pictures = [graph.add("VAEDecode", node.title.split(":")[0], samples=node[0], vae=model[2]) for node in pair]
    measure(
        graph, ATTRIBUTE, "uniform", classifier[0], [node[0] for node in pictures], ["Before", "After"], 4, steered[1]
    )
    return graph
