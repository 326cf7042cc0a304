"""What several workflows have in common: loaders, samplers, Steer, and the last group that looks and measures."""

from __future__ import annotations

from .graph import Graph, Inlet, Link, Node, Subgraph


def load_model(graph: Graph, name: str = "avatars.safetensors") -> Node:
    return graph.add(
        "DiffLensLoadModel", None, model_name=name, schedule="auto", prediction="auto", class_label=0, heads=0,
        new_attention_order=False,
    )  # fmt: skip


def load_classifier(graph: Graph, name: str = "avatars.safetensors") -> Node:
    return graph.add("DiffLensLoadClassifier", None, classifier_name=name, face_detector="none")


def sampler(
    graph: Graph, title: str, model: Link | Inlet, positive: Link | Inlet, latent: Node, seed: int | Inlet,
    negative: Link | Inlet | None = None, cfg: float = 1.0,
) -> Node:  # fmt: skip
    """A stock KSampler as all graphs use it."""
    return graph.add(
        "KSampler", title, model=model, seed=seed, steps=20, cfg=cfg, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative or positive, latent_image=latent[0], denoise=1.0,
    )  # fmt: skip


def steer(
    graph: Graph, title: str | None, model: Link | Inlet, recipe: Link, target: str | Inlet = "uniform",
    strength: float = 1.0,
) -> Node:  # fmt: skip
    return graph.add(
        "DiffLensSteer", title, model=model, recipe=recipe, target=target, strength=strength, mode="from recipe",
        start_percent=0.0, end_percent=1.0, seed=0, first_image=0, conditioning="positive", run=0,
        hold="from recipe",
    )  # fmt: skip


def find_features(
    graph: Graph, model: Link | Inlet, captured: Node, labels: Node, latents: int, steps: int | Inlet, batch_size: int,
    save_as: str,
) -> Node:  # fmt: skip
    """From what was captured to the recipe, in two groups; the rest is how the SAE is trained."""
    graph.group("2 Learn the features")
    sae = graph.add(
        "DiffLensTrainSAE", None, activations=captured[0], latents=latents, k=32, steps=steps, batch_size=batch_size,
        learning_rate=0.001, seed=0, save_as=save_as, activation="topk", precision="fp32",
    )  # fmt: skip
    graph.add("PreviewAny", "Quality of the SAE", source=sae[2])
    graph.group("3 Find those that decide the attribute")
    probes = graph.add("DiffLensTrainProbes", None, activations=captured[0], sae=sae[0], labels=labels[0])
    graph.add("PreviewAny", "Accuracy of the probes", source=probes[2])
    graph.column()
    found = graph.add(
        "DiffLensAttribute", None, model=model, activations=captured[0], sae=sae[0], probes=probes[0],
        labels=labels[0], method="class mean difference", features_per_class=120,
    )  # fmt: skip
    graph.add("PreviewAny", "Ranking", source=found[2])
    return found


def report_on(
    graph: Graph, title: str | None, classifier: Link, attribute: str, target: str, before: Link, after: Link,
    targets: Link, save_as: str = "difflens/report",
) -> Node:  # fmt: skip
    """A Fairness Report that writes its page."""
    return graph.add(
        "DiffLensReport", title, classifier=classifier, attribute=attribute, target=target, before=before,
        after=after, targets=targets, joint_with="", confusion="", undecided_below=0.0, perceptual="none", notes="",
        save_as=save_as,
    )  # fmt: skip


def compare(graph: Graph, pictures: list[Link], titles: list[str], columns: int, title: str | None = None) -> Node:
    rows = {f"rows.row{i}": batch for i, batch in enumerate(pictures)}
    return graph.add("DiffLensCompare", title, **rows, titles="\n".join(titles), columns=columns)


def measure(
    graph: Graph, attribute: str, target: str, classifier: Link, pictures: list[Link], titles: list[str], columns: int,
    targets: Link,
) -> None:  # fmt: skip
    """The last group: all pictures side by side, and the report on the first and the last batch."""
    graph.group("Look and measure")
    grid = compare(graph, pictures, titles, columns)
    graph.save("Save the comparison", grid[0], "difflens/comparison")
    graph.column()
    report = report_on(graph, None, classifier, attribute, target, pictures[0], pictures[-1], targets)
    graph.save("Save the chart", report[2], "difflens/chart")
    graph.column()
    graph.add("PreviewAny", "The report in words", source=report[0])


def before_and_after(graph: Graph, model: Node, recipe: Node, classifier: Node, latent: Node, columns: int) -> None:
    """The same pictures without and with steering to a fair mix of presentations, side by side and measured."""
    steered = steer(graph, None, model[0], recipe[0])
    graph.column()
    before = sampler(graph, "Before: as the model likes", model[0], model[1], latent, 7)
    after = sampler(graph, "After: steered", steered[0], model[1], latent, 7)
    graph.column()
    before = graph.add("VAEDecode", "Pictures before", samples=before[0], vae=model[2])
    after = graph.add("VAEDecode", "Pictures after", samples=after[0], vae=model[2])
    measure(
        graph, "presentation", "uniform", classifier[0], [before[0], after[0]], ["Before", "After"], columns, steered[1]
    )


def draw_twice(seed: int, pictures: int, prompted: bool, sized: bool = False) -> Subgraph:
    """One node that draws with two models from the same noise: of `prompted`, guided away from no prompt at cfg 2.

    sized: width and height are inputs, else 64.
    """
    how = ", of any size" if sized else "" if prompted else ", without a prompt"
    inside = Graph(f"Draw before and after{how}", first_id=101)
    inside.group("")
    sides = ("width", "height")
    size = {side: Inlet(side, 64) if sized else 64 for side in sides}
    latent = inside.add("EmptyLatentImage", None, **size, batch_size=Inlet("pictures", pictures))
    positive = negative = Inlet("prompt")
    if prompted:
        negative = inside.add("CLIPTextEncode", "No prompt, to guide away from", text="", clip=Inlet("clip"))[0]
    inside.column()
    drawn = [
        sampler(inside, title, Inlet(model), positive, latent, Inlet("seed", seed), negative, 2.0 if prompted else 1.0)
        for title, model in (("Before: as the model likes", "model"), ("After: steered", "steered"))
    ]
    inside.column()
    before, after = (inside.add("VAEDecode", None, samples=node[0], vae=Inlet("vae")) for node in drawn)
    clip, more = ["clip"] if prompted else [], sides if sized else []
    inputs = ("model", "steered", "prompt", *clip, "vae", "seed", "pictures", *more)
    return Subgraph(
        inside, inputs, {"before": before[0], "after": after[0]},
        "Draws the same pictures with two models: the same seed, the same prompt, the same settings.",
    )  # fmt: skip


def experiment(graph: Graph, type: str, model: Node, latent: Node, classifier: Node, **settings: object) -> Node:
    """A node that samples pictures of its own, ten quick steps each, and reads them."""
    return graph.add(
        type, None, model=model[0], positive=model[1], latent_image=latent[0], vae=model[2], classifier=classifier[0],
        steps=10, sampler_name="euler", scheduler="simple", seed=1, cfg=1.0, **settings,
    )  # fmt: skip
