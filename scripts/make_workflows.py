"""Write the workflows: each is described once here and becomes two files.

    python scripts/make_workflows.py               write workflows/*.json and workflows/api/*.json
    python scripts/make_workflows.py --thumbnails  run them as well and write workflows/*.jpg (needs Pillow)

`<name>.json` opens in ComfyUI; `api/<name_with_underscores>.json` is what `/prompt` takes. A real server is asked
for the order of every node's inputs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from environment import REPOSITORY
from host import Server

FOLDER = REPOSITORY / "workflows"
AFTER_SEED = "fixed"  # value of the widget "control after generate", which ComfyUI puts below a seed

# Pixels on ComfyUI's canvas.
WIDTH, TITLE, SLOT, WIDGET, PADDING = 320, 30, 22, 26, 20
GAP, GROUP_GAP, GROUP_TITLE = 60, 60, 60
# Type or title: (width, height beyond its slots and widgets). The large ones draw a picture or text on themselves.
SIZES = {
    "MarkdownNote": (400, 540),
    "DiffLensCompare": (760, 560),
    "DiffLensTrainSAE": (460, 300),
    "DiffLensTrainProbes": (460, 300),
    "DiffLensAttribute": (460, 300),
    "DiffLensReport": (520, 340),
    "DiffLensSiteScan": (560, 340),
    "DiffLensRankByEffect": (560, 340),
    "DiffLensCalibrate": (560, 340),
    "DiffLensCrossEffects": (560, 340),
    "DiffLensDiagnose": (760, 480),
    "PreviewAny": (520, 260),
    "The report in words": (520, 700),  # as high as the report beside it
    "SaveImage": (460, 260),
}
MULTILINE = 80  # extra height of a text box
COLOURS = ("#3f789e", "#8A8", "#a1309b", "#b58b2a", "#88A", "#b06634")


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int


@dataclass
class Node:
    """A node of a graph: its inputs are values, or links from other nodes. `node[1]` is its second output."""

    id: int
    type: str
    title: str | None
    inputs: dict

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


@dataclass
class Graph:
    """A workflow: named groups from left to right, each of columns, each of nodes from top to bottom."""

    name: str
    groups: list[tuple[str, list[list[Node]]]] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [node for _, columns in self.groups for column in columns for node in column]

    def group(self, title: str) -> None:
        self.groups.append((title, [[]]))

    def column(self) -> None:
        self.groups[-1][1].append([])

    def add(self, type: str, title: str | None = None, **inputs: object) -> Node:
        node = Node(len(self.nodes) + 1, type, title, inputs)
        self.groups[-1][1][-1].append(node)
        return node

    def note(self, text: str) -> None:
        self.add("MarkdownNote", "Read me", text=text)


# --- the graphs ---


def sampler(
    graph: Graph, title: str, model: Link, positive: Link, latent: Node, seed: int, negative: Link | None = None,
    cfg: float = 1.0,
) -> Node:  # fmt: skip
    """A stock KSampler as all graphs use it."""
    return graph.add(
        "KSampler", title, model=model, seed=seed, steps=20, cfg=cfg, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative or positive, latent_image=latent[0], denoise=1.0,
    )  # fmt: skip


def steer(graph: Graph, title: str, model: Link, recipe: Link, target: str = "uniform", strength: float = 1.0) -> Node:
    return graph.add(
        "DiffLensSteer", title, model=model, recipe=recipe, target=target, strength=strength, mode="from recipe",
        start_percent=0.0, end_percent=1.0, seed=0, first_image=0, conditioning="positive",
    )  # fmt: skip


def report_on(
    graph: Graph, title: str | None, classifier: Link, attribute: str, target: str, before: Node, after: Node,
    targets: Link, save_as: str = "difflens/report",
) -> Node:  # fmt: skip
    """A Fairness Report that writes its page."""
    return graph.add(
        "DiffLensReport", title, classifier=classifier, attribute=attribute, target=target, before=before[0],
        after=after[0], targets=targets, joint_with="", confusion="", undecided_below=0.0, perceptual="none", notes="",
        save_as=save_as,
    )  # fmt: skip


def measure(
    graph: Graph, attribute: str, target: str, classifier: Link, pictures: list[Node], titles: list[str], columns: int,
    targets: Link,
) -> None:  # fmt: skip
    """The last group: all pictures side by side, and the report on the first and the last batch."""
    graph.group("Look and measure")
    rows = {f"rows.row{i}": batch[0] for i, batch in enumerate(pictures)}
    grid = graph.add("DiffLensCompare", None, **rows, titles="\n".join(titles), columns=columns)
    graph.add("SaveImage", "Save the comparison", images=grid[0], filename_prefix="difflens/comparison")
    graph.column()
    report = report_on(graph, None, classifier, attribute, target, pictures[0], pictures[-1], targets)
    graph.add("SaveImage", "Save the chart", images=report[2], filename_prefix="difflens/chart")
    graph.column()
    graph.add("PreviewAny", "The report in words", source=report[0])
    graph.add("PreviewAny", "The report for machines (JSON)", source=report[1])


def before_and_after(graph: Graph, model: Node, recipe: Node, classifier: Node, latent: Node, columns: int) -> None:
    """The same pictures without and with steering to a fair mix of presentations, side by side and measured."""
    steered = steer(graph, None, model[0], recipe[0])
    graph.column()
    before = sampler(graph, "Before: as the model likes", model[0], model[1], latent, 7)
    after = sampler(graph, "After: steered", steered[0], model[1], latent, 7)
    graph.column()
    before = graph.add("VAEDecode", "Pictures before", samples=before[0], vae=model[2])
    after = graph.add("VAEDecode", "Pictures after", samples=after[0], vae=model[2])
    measure(graph, "presentation", "uniform", classifier[0], [before, after], ["Before", "After"], columns, steered[1])


def load_model(graph: Graph, name: str = "avatars.safetensors") -> Node:
    return graph.add(
        "DiffLensLoadModel", None, model_name=name, schedule="auto", prediction="auto", class_label=0, heads=0,
        new_attention_order=False,
    )  # fmt: skip


def load_classifier(graph: Graph, name: str = "avatars.safetensors") -> Node:
    return graph.add("DiffLensLoadClassifier", None, classifier_name=name, face_detector="none")


def debias_the_avatars() -> Graph:
    graph = Graph("01 debias the avatars")
    graph.group("Start here")
    graph.note(
        "# Turn a bias down\n\n"
        "The avatars are a small model that draws portraits. It learned from pictures of which four in five show "
        "a masculine presentation, and draws the same.\n\n"
        "Press **Run**. The same 16 portraits are drawn twice from the same noise: once as the model likes, once "
        "with **Steer** in front of the sampler. Steer asks for a fair mix; portraits that already fit are left "
        "alone.\n\n"
        "**Compare Images** shows both, **Fairness Report** measures them. The discrepancy is the distance from a fair "
        "mix: 0 is perfect. The report also writes a page to print or to send: `difflens/report` in ComfyUI's output "
        "folder.\n\n"
        "**Try next**\n"
        "- another recipe and the same attribute in the report: age, skin_tone\n"
        "- `target` in Steer and report: `feminine`, or shares such as `1, 3`\n"
        "- another seed, the same in both samplers\n\n"
        "An attribute is what a classifier sees in a picture, not what a person is."
    )
    graph.group("Model, recipe and classifier")
    model = load_model(graph)
    recipe = graph.add("DiffLensLoadRecipe", None, recipe_name="avatars_presentation.safetensors")
    classifier = load_classifier(graph)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=16)
    graph.group("Draw the same pictures without and with steering")
    before_and_after(graph, model, recipe, classifier, latent, 8)
    return graph


def find_the_bias_features() -> Graph:
    graph = Graph("02 find the bias features")
    graph.group("Start here")
    graph.note(
        "# From a model alone to a recipe\n\n"
        "This is the whole way, a few minutes on two processor cores:\n\n"
        "1. **Capture** draws 256 portraits and records what goes through the middle of the model.\n"
        "2. **Train SAE** takes the records apart into 1024 features, few of them active at a time.\n"
        "3. **Classify** reads each portrait; **Train Probes** learns to read the same from the record, step by "
        "step.\n"
        "4. **Attribute Features** ranks the features by how much they decide the attribute, and makes a "
        "**recipe** of the best.\n"
        "5. **Steer** uses the recipe on portraits from another seed, and the report measures the effect.\n\n"
        "The recipe is saved and then appears in Load Recipe.\n\n"
        "**Try next**\n"
        "- `attribute` in Classify Images and in the report: age, skin_tone\n"
        "- a name in `save_as` of Train SAE keeps the SAE\n"
        "- more pictures and more steps: a better SAE"
    )
    graph.group("1 Draw and record")
    model = load_model(graph)
    batch = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    classifier = load_classifier(graph)
    graph.column()
    captured = graph.add(
        "DiffLensCapture", None, model=model[0], positive=model[1], latent_image=batch[0], vae=model[2],
        pictures=256, steps=20, sampler_name="euler", scheduler="simple", seed=0, site="middle_block",
        start_percent=0.0, end_percent=1.0, dtype="float16", save_as="", cfg=1.0,
    )  # fmt: skip
    labels = graph.add("DiffLensClassify", None, images=captured[1], classifier=classifier[0], attribute="presentation")
    graph.group("2 Learn the features")
    sae = graph.add(
        "DiffLensTrainSAE", None, activations=captured[0], latents=1024, k=32, steps=1500, batch_size=2048,
        learning_rate=0.001, seed=0, save_as="", activation="topk", precision="fp32",
    )  # fmt: skip
    graph.add("PreviewAny", "Quality of the SAE", source=sae[2])
    graph.group("3 Find those that decide the attribute")
    probes = graph.add("DiffLensTrainProbes", None, activations=captured[0], sae=sae[0], labels=labels[0])
    graph.add("PreviewAny", "Accuracy of the probes", source=probes[2])
    graph.column()
    found = graph.add(
        "DiffLensAttribute", None, model=model[0], activations=captured[0], sae=sae[0], probes=probes[0],
        labels=labels[0], method="contrastive", features_per_class=60,
    )  # fmt: skip
    graph.add("PreviewAny", "Ranking", source=found[2])
    graph.group("4 Steer other pictures by them")
    graph.add("DiffLensSaveRecipe", None, recipe=found[0], name="my_presentation")
    before_and_after(graph, model, found, classifier, batch, 16)
    return graph


def dose_response() -> Graph:
    graph = Graph("03 dose response")
    strengths = (0.0, 0.5, 1.0, 1.5, 2.0)
    graph.group("Start here")
    graph.note(
        "# How much is enough?\n\n"
        "The same eight portraits, drawn five times from the same noise. Each row asks for the age **senior** with "
        "another strength of the same recipe, from 0 (no change at all) to 2.\n\n"
        "Look down a column: one portrait ages while its background, clothes and the rest should stay.\n\n"
        "The report compares the strongest row with strength 0. `success` is the share that shows what was asked "
        "for; `kept` is the share that kept its other attributes.\n\n"
        "**Try next**\n"
        "- `target` in every Steer: `young`\n"
        "- another recipe, with one of its classes as target\n"
        "- `start_percent` 0.3 in Steer: later steps alone change less"
    )
    graph.group("Model, recipe and classifier")
    model = load_model(graph)
    recipe = graph.add("DiffLensLoadRecipe", None, recipe_name="avatars_age.safetensors")
    classifier = load_classifier(graph)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=8)
    graph.group("One row for each strength")
    names = [f"Strength {strength:g}" for strength in strengths]
    steered = [
        steer(graph, f"Steer, {name.lower()}", model[0], recipe[0], "senior", strength)
        for name, strength in zip(names, strengths, strict=True)
    ]
    graph.column()
    sampled = [sampler(graph, name, node[0], model[1], latent, 7) for name, node in zip(names, steered, strict=True)]
    graph.column()
    pictures = [graph.add("VAEDecode", None, samples=node[0], vae=model[2]) for node in sampled]
    measure(graph, "age", "senior", classifier[0], pictures, names, 8, steered[-1][1])
    return graph


def debias_a_prompt() -> Graph:
    graph = Graph("04 debias a prompt")
    jobs = ("doctor", "nurse", "firefighter", "receptionist")
    graph.group("Start here")
    graph.note(
        "# One recipe for four prompts\n\n"
        "This small model draws by prompt. It learned that doctors and firefighters look masculine, nurses and "
        "receptionists feminine, and each occupation has its usual age.\n\n"
        "Press **Run**. For each prompt the same 16 portraits are drawn twice: as the model likes, and with **Steer** "
        "in front of the sampler, which asks for a fair mix of presentations. A report follows for every prompt. "
        "Coat, helmet or headset should stay.\n\n"
        "**Try next**\n"
        "- the recipe `prompted_avatars_age` and `age` in the reports\n"
        "- other prompts: `portrait of a smiling person`, `an old nurse with glasses`\n"
        "- another `cfg`, the same in both samplers: more guidance, more bias\n\n"
        "An attribute is what a classifier sees in a picture, not what a person is."
    )
    graph.group("Model, recipe and classifier")
    model = graph.add("DiffLensLoadPromptedModel", None, model_name="prompted_avatars.safetensors")
    recipe = graph.add("DiffLensLoadRecipe", None, recipe_name="prompted_avatars_presentation.safetensors")
    classifier = load_classifier(graph, "prompted_avatars.safetensors")
    latent = graph.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=16)
    steered = steer(graph, None, model[0], recipe[0])
    graph.group("Prompts")
    empty = graph.add("CLIPTextEncode", "No prompt, to guide away from", text="", clip=model[1])
    prompts = [graph.add("CLIPTextEncode", job.title(), text=f"portrait of a {job}", clip=model[1]) for job in jobs]
    graph.group("Draw the same pictures without and with steering")
    drawn = {}
    for title, source in (("before", model[0]), ("after", steered[0])):
        for job, prompt in zip(jobs, prompts, strict=True):
            name = f"{job.title()}, {title}"
            drawn[name] = sampler(graph, name, source, prompt[0], latent, 7, empty[0], 2.0)
        graph.column()
    pictures = {name: graph.add("VAEDecode", name, samples=node[0], vae=model[2]) for name, node in drawn.items()}
    graph.group("Look and measure")
    ordered = [f"{job.title()}, {title}" for job in jobs for title in ("before", "after")]
    rows = {f"rows.row{i}": pictures[name][0] for i, name in enumerate(ordered)}
    grid = graph.add("DiffLensCompare", None, **rows, titles="\n".join(ordered), columns=16)
    graph.add("SaveImage", "Save the comparison", images=grid[0], filename_prefix="difflens/comparison")
    for job in jobs:
        graph.column()
        before, after = (pictures[f"{job.title()}, {title}"] for title in ("before", "after"))
        report = report_on(
            graph, job.title(), classifier[0], "presentation", "uniform", before, after, steered[1],
            f"difflens/report {job}",
        )  # fmt: skip
        graph.add("PreviewAny", f"{job.title()}: the report in words", source=report[0])
        graph.add("PreviewAny", f"{job.title()}: the report for machines (JSON)", source=report[1])
    return graph


def steer_by_files(graph: Graph, model: Link, sae: Node, features: Node) -> Node:
    """Steer as the paper does: features from files, all steps of 50 but the first and the last."""
    steered = steer(graph, None, model, features[0])
    steered.inputs |= {"start_percent": 0.02, "end_percent": 0.97, "sae": sae[0]}
    return steered


def paper_pair(
    graph: Graph, models: list[Link], sampler: Node, sigmas: Node, positive: Link, negative: Link, latent: Node,
    vae: Link, cfg: float,
) -> list[Node]:  # fmt: skip
    """Pictures of the model and of the steered model from the same noise, by SamplerCustom."""
    drawn = [
        graph.add(
            "SamplerCustom",
            title,
            model=model,
            add_noise=True,
            noise_seed=7,
            cfg=cfg,
            positive=positive,
            negative=negative,
            sampler=sampler[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
        )  # fmt: skip
        for title, model in zip(("Before: as the model likes", "After: steered"), models, strict=True)
    ]
    graph.column()
    return [graph.add("VAEDecode", None, samples=node[0], vae=vae) for node in drawn]


def paper_unconditional() -> Graph:
    graph = Graph("05 paper unconditional")
    graph.group("Start here")
    graph.note(
        "# The paper's unconditional set-up\n\n"
        "P2 on CelebA-HQ 256, steered by the SAE and the features that its authors published. Bring the files:\n\n"
        "- `models/difflens_models/celebahq_p2.pt`\n"
        "- `models/difflens_saes/p2/` with `cfg.json` and `sae.safetensors`\n"
        "- `models/difflens_saes/p2/gender/` with `male.pt` and `female.pt`\n"
        "- `models/difflens_classifiers/res34_fair_align_multi_7_20190809.pt` (FairFace)\n\n"
        "50 DDIM steps, eta 1. **Reference Sampler** runs the model twice a step, as the reference code does. The "
        "paper's scale of 1.43 is a strength of 0.43.\n\n"
        "**Try next**\n"
        "- KSamplerSelect `euler` in place of Reference Sampler: half the time, and the edit acts in full\n"
        "- age: features 30, scale 1, 1, 3 (strength `0, 0, 2`); race: `30, 100, 30, 30`, strength `0, 4, 0.5, 0.5`\n"
        "- the paper measures 10 000 pictures"
    )
    graph.group("Model, SAE, features and classifier")
    model = load_model(graph, "celebahq_p2.pt")
    sae = graph.add("DiffLensLoadSAE", None, sae_name="p2", site="middle_block")
    features = graph.add(
        "DiffLensLoadFeatures", None, folder="p2/gender", sae=sae[0], attribute="gender", classes="male, female",
        features_per_class="30", mode="scale", strength="0.43, 0",
    )  # fmt: skip
    classifier = load_classifier(graph, "res34_fair_align_multi_7_20190809.pt")
    graph.group("Draw the same pictures without and with steering")
    steered = steer_by_files(graph, model[0], sae, features)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=256, height=256, batch_size=8)
    sampler = graph.add("DiffLensReferenceSampler", None, eta=1.0)
    sigmas = graph.add("DiffLensDDIMSigmas", None, model=model[0], steps=50, spacing="ddim")
    graph.column()
    pictures = paper_pair(graph, [model[0], steered[0]], sampler, sigmas, model[1], model[1], latent, model[2], 1.0)
    measure(graph, "gender", "uniform", classifier[0], pictures, ["Before", "After"], 8, steered[1])
    return graph


def paper_stable_diffusion() -> Graph:
    graph = Graph("06 paper Stable Diffusion")
    graph.group("Start here")
    graph.note(
        "# The paper's Stable Diffusion set-up\n\n"
        "SD 1.5, steered by the SAE and the features of age that the paper's authors published. Bring the files:\n\n"
        "- `models/checkpoints/v1-5-pruned-emaonly.safetensors`\n"
        "- `models/difflens_saes/sd15/` with `cfg.json` and `sae.safetensors`\n"
        "- `models/difflens_saes/sd15/age/` with `young.pt`, `adult.pt` and `old.pt`\n"
        "- `models/difflens_classifiers/res34_fair_align_multi_7_20190809.pt` (FairFace)\n\n"
        "The SAE reads the whole 8 x 8 map at once, so draw at 512 x 512. Only the prompt's half is steered. The "
        "paper adds 30 to 10 features of young, and 50 to 30 features of old.\n\n"
        "**Try next**\n"
        "- its other prompts: firefighter, receptionist, nurse; 500 pictures each\n"
        "- a YuNet file as `face_detector`: the paper cuts out faces before it classifies them"
    )
    graph.group("Model, SAE, features and classifier")
    model = graph.add("CheckpointLoaderSimple", None, ckpt_name="v1-5-pruned-emaonly.safetensors")
    sae = graph.add("DiffLensLoadSAE", None, sae_name="sd15", site="middle_block")
    features = graph.add(
        "DiffLensLoadFeatures", None, folder="sd15/age", sae=sae[0], attribute="age", classes="young, adult, old",
        features_per_class="10, 0, 30", mode="add own fixed", strength="30, 0, 50",
    )  # fmt: skip
    classifier = load_classifier(graph, "res34_fair_align_multi_7_20190809.pt")
    graph.group("Draw the same pictures without and with steering")
    steered = steer_by_files(graph, model[0], sae, features)
    positive = graph.add("CLIPTextEncode", "Prompt", text="A face of a doctor", clip=model[1])
    negative = graph.add("CLIPTextEncode", "No prompt, to guide away from", text="", clip=model[1])
    latent = graph.add("EmptyLatentImage", "How many pictures", width=512, height=512, batch_size=6)
    graph.column()
    sampler = graph.add("KSamplerSelect", None, sampler_name="euler")
    sigmas = graph.add("DiffLensDDIMSigmas", None, model=model[0], steps=50, spacing="leading")
    graph.column()
    pictures = paper_pair(
        graph, [model[0], steered[0]], sampler, sigmas, positive[0], negative[0], latent, model[2], 7.5
    )
    measure(graph, "age", "uniform", classifier[0], pictures, ["Before", "After"], 6, steered[1])
    return graph


def experiment(graph: Graph, type: str, model: Node, latent: Node, classifier: Node, **settings: object) -> Node:
    """A node that samples pictures of its own, ten quick steps each, and reads them."""
    return graph.add(
        type, None, model=model[0], positive=model[1], latent_image=latent[0], vae=model[2], classifier=classifier[0],
        steps=10, sampler_name="euler", scheduler="simple", seed=1, cfg=1.0, **settings,
    )  # fmt: skip


def three_attributes_at_once() -> Graph:
    graph = Graph("07 three attributes at once")
    attributes = ("presentation", "age", "skin_tone")
    graph.group("Start here")
    graph.note(
        "# Three attributes at once\n\n"
        "Two presentations, three ages, four skin tones: 24 combinations. The avatars draw mostly one of them.\n\n"
        "Press **Run**. 48 portraits are drawn as the model likes. **Plan Targets** reads them and says which to "
        "change, and into what, so that every combination comes up twice and as few portraits as possible change. "
        "Three chained **Steer** nodes do it; portraits that already fit stay as they are, to the pixel.\n\n"
        "**Cross Effects** steers by each recipe alone and tells what happens to the other attributes.\n\n"
        "**Try next**\n"
        "- `target` of Plan Targets, a line for each recipe: `uniform`, `1, 2, 1`, `uniform`\n"
        "- **Calibrate** behind a Load Recipe finds its strengths for your target. It draws 1280 portraits, some "
        "three minutes on two processor cores\n"
        "- another attribute in the report\n\n"
        "An attribute is what a classifier sees in a picture, not what a person is."
    )
    graph.group("Model, recipes and classifier")
    model = load_model(graph)
    classifier = load_classifier(graph)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=48)
    graph.column()
    names = [attribute.replace("_", " ") for attribute in attributes]
    recipes = [
        graph.add("DiffLensLoadRecipe", f"Recipe, {name}", recipe_name=f"avatars_{attribute}.safetensors")
        for attribute, name in zip(attributes, names, strict=True)
    ]
    sockets = {f"recipes.recipe{i}": recipe[0] for i, recipe in enumerate(recipes)}
    graph.group("As the model likes")
    before = sampler(graph, "Before: as the model likes", model[0], model[1], latent, 7)
    before = graph.add("VAEDecode", "Pictures before", samples=before[0], vae=model[2])
    graph.group("Plan and steer")
    plan = graph.add(
        "DiffLensPlan", None, classifier=classifier[0], before=before[0], **sockets, target="uniform", seed=0
    )
    graph.add("PreviewAny", "The plan", source=plan[1])
    graph.column()
    steered = model[0]
    for recipe, name in zip(recipes, names, strict=True):
        node = steer(graph, f"Steer, {name}", steered, recipe[0])
        node.inputs["targets"] = plan[0]
        steered = node[0]
    graph.column()
    after = sampler(graph, "After: steered", steered, model[1], latent, 7)
    after = graph.add("VAEDecode", "Pictures after", samples=after[0], vae=model[2])
    measure(graph, "skin_tone", "uniform", classifier[0], [before, after], ["Before", "After"], 16, plan[0])
    (report,) = (node for node in graph.nodes if node.type == "DiffLensReport")
    report.inputs["joint_with"] = "presentation, age"
    graph.group("Steer one, watch the others")
    batch = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    cross = experiment(graph, "DiffLensCrossEffects", model, batch, classifier, **sockets, pictures=64)
    graph.column()
    graph.add("PreviewAny", "The matrix", source=cross[0])
    return graph


def where_is_it_decided() -> Graph:
    graph = Graph("08 where is it decided")
    graph.group("Start here")
    graph.note(
        "# Where in the model is it decided, and when?\n\n"
        "Before you capture and train: which module should it be? **Site Scan** tries some. At each it takes the mean "
        "of what comes out for every age, then draws portraits of other ages again and adds half the difference, to "
        "turn them.\n\n"
        "Each group of bars is a module, from the model's input to its output. A bar is the share of portraits that "
        "turned. *whole*: the difference was added in all steps; then in a *third* of them alone; *reversed*: it was "
        "taken away instead, which must not work.\n\n"
        "A good place for an SAE has a high *whole* and no *reversed*. In the avatars all modules do alike, because "
        "nothing goes around them; in a network with skips they differ. The first and the last third of the sampling "
        "count more than the middle. The table also tells what else changed.\n\n"
        "**Try next**\n"
        "- `strength` 1: now nearly all portraits turn\n"
        "- `attribute`: presentation, skin_tone\n"
        "- `sites` empty: all that the node proposes\n"
        "- your own model: prompts into positive and negative, `cfg` as you use it"
    )
    graph.group("Model and classifier")
    model = load_model(graph)
    classifier = load_classifier(graph)
    latent = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    graph.group("Try some modules")
    scan = experiment(
        graph, "DiffLensSiteScan", model, latent, classifier, attribute="age",
        sites="encoder\ndown\nmiddle_block\nafter_middle\ndecoder", pictures=96, per_class=6, strength=0.5,
    )  # fmt: skip
    graph.column()
    graph.add("SaveImage", "Save the chart", images=scan[2], filename_prefix="difflens/sites")
    graph.add("PreviewAny", "The table", source=scan[0])
    return graph


def which_features_count() -> Graph:
    graph = Graph("09 which features count")
    graph.group("Start here")
    graph.note(
        "# Which features really do it?\n\n"
        "The recipe names 120 features that should carry the presentation. **Rank by Effect** puts that to the test: "
        "it strengthens each of them alone while the same six portraits are drawn, and sees how the class changes. "
        "Few of them turn a portrait alone. The twenty of each class that change it most are kept.\n\n"
        "Then eight portraits are drawn three times from the same noise: as the model likes, steered to *feminine* by "
        "all features, and by the third of them that was kept. The report compares the last with the first; look at "
        "the pictures, too: what the classifier takes for a class may still be half of another.\n\n"
        "**Try next**\n"
        "- `features_per_class` in Rank by Effect: 5, 60\n"
        "- `change`: ablate\n"
        "- more `pictures`: the whiskers, one standard error, get shorter\n"
        "- Save Recipe keeps the short recipe"
    )
    graph.group("Model, recipe and classifier")
    model = load_model(graph)
    recipe = graph.add("DiffLensLoadRecipe", None, recipe_name="avatars_presentation.safetensors")
    classifier = load_classifier(graph)
    batch = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=64, height=64, batch_size=8)
    graph.group("Change every feature alone")
    ranked = experiment(
        graph, "DiffLensRankByEffect", model, batch, classifier, recipe=recipe[0], change="amplify", strength=10.0,
        pictures=6, features_per_class=20,
    )  # fmt: skip
    graph.add("PreviewAny", "Effect of every feature", source=ranked[2])
    graph.group("Steer by all and by the best")
    full = steer(graph, "Steer by all", model[0], recipe[0], "feminine")
    short = steer(graph, "Steer by the best", model[0], ranked[0], "feminine")
    graph.column()
    titles = ["Before", "All features", "The best"]
    models = [model[0], full[0], short[0]]
    drawn = [sampler(graph, name, node, model[1], latent, 7) for name, node in zip(titles, models, strict=True)]
    graph.column()
    pictures = [graph.add("VAEDecode", None, samples=node[0], vae=model[2]) for node in drawn]
    measure(graph, "presentation", "feminine", classifier[0], pictures, titles, 8, short[1])
    return graph


def why_does_it_not_work() -> Graph:
    graph = Graph("10 why does it not work")
    graph.group("Start here")
    graph.note(
        "# Why does a recipe work, or not?\n\n"
        "Two recipes for the same attribute: the one that comes with the model, and a control with as many features "
        "drawn at random and an edit as strong. **Diagnose** steers the same portraits in several ways and says in one "
        "sentence what is wrong with each.\n\n"
        "It checks, in this order, because each needs the one before:\n"
        "1. is it the right place in the model?\n"
        "2. are the features disentangled?\n"
        "3. are they the right features? The best few and random ones are tried alone.\n"
        "4. does more of them do more?\n\n"
        "The first check that fails is the one to mend. A portrait *turns* when it shows the class asked for, and did "
        "not before.\n\n"
        "The second check needs labelled activations, as in `02 find the bias features`; the control leaves out the "
        "first, which would say the same again.\n\n"
        "**Try next**\n"
        "- a recipe of your own\n"
        "- `avatars_age` and `controls/age_random`\n"
        "- Capture Activations and Classify Images into the first Diagnose\n"
        "- `pictures` 16: surer, and twice the time"
    )
    graph.group("Model, recipes, SAE and classifier")
    model = load_model(graph)
    classifier = load_classifier(graph)
    sae = graph.add("DiffLensLoadSAE", None, sae_name="avatars.safetensors", site="")
    latent = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    graph.column()
    names = {"The recipe": "avatars_presentation", "Random features": "controls/presentation_random"}
    recipes = [
        graph.add("DiffLensLoadRecipe", title, recipe_name=f"{name}.safetensors") for title, name in names.items()
    ]
    graph.group("What is wrong?")
    found = [
        experiment(
            graph, "DiffLensDiagnose", model, latent, classifier, recipe=recipe[0], pictures=8, scan_sites=first,
            sae=sae[0],
        )
        for recipe, first in zip(recipes, (True, False), strict=True)
    ]  # fmt: skip
    graph.column()
    for title, node in zip(names, found, strict=True):
        graph.add("PreviewAny", f"{title}: the verdict", source=node[0])
    graph.column()
    for title, node in zip(names, found, strict=True):
        graph.add("SaveImage", f"{title}: save the chart", images=node[2], filename_prefix="difflens/diagnosis")
    return graph


GRAPHS = (
    debias_the_avatars, find_the_bias_features, dose_response, debias_a_prompt, paper_unconditional,
    paper_stable_diffusion, three_attributes_at_once, where_is_it_decided, which_features_count,
    why_does_it_not_work,
)  # fmt: skip


# --- the two formats ---


def to_api(graph: Graph) -> dict:
    """The graph as `/prompt` takes it; notes are left out."""
    return {
        str(node.id): {
            "class_type": node.type,
            "inputs": {
                name: [str(value.node.id), value.slot] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            **({"_meta": {"title": node.title}} if node.title else {}),
        }
        for node in graph.nodes
        if node.type != "MarkdownNote"
    }


def declared_inputs(info: dict, node: Node) -> list[tuple[str, str, dict]]:
    """(name, type, options) of the inputs in the order on the node; a growing input becomes its slots."""
    found = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            declared = info["input"][kind][name]
            type_, options = declared[0], declared[1] if len(declared) > 1 else {}
            if type_ == "COMFY_AUTOGROW_V3":
                (inner,) = options["template"]["input"]["required"].values()
                used = [key for key in node.inputs if key.startswith(f"{name}.")]
                found += [(key, inner[0], {}) for key in used]
                found.append((f"{name}.{options['template']['prefix']}{len(used)}", inner[0], {}))
            else:
                found.append((name, "COMBO" if isinstance(type_, list) else type_, options))
    unknown = set(node.inputs) - {name for name, _, _ in found}
    if unknown:
        raise SystemExit(f"{node.type} has no input {', '.join(sorted(unknown))}.")
    return found


def is_widget(type_: str, options: dict) -> bool:
    return type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and not options.get("forceInput")


def to_ui(graph: Graph, object_info: dict) -> dict:
    """The graph as ComfyUI opens it."""
    nodes, links = [], []
    for order, node in enumerate(graph.nodes):
        item = {
            "id": node.id, "type": node.type, "pos": [0, 0], "size": [0, 0], "flags": {}, "order": order, "mode": 0,
            "inputs": [], "outputs": [], "properties": {"Node name for S&R": node.type}, "widgets_values": [],
        }  # fmt: skip
        if node.title:
            item["title"] = node.title
        width, extra = SIZES.get(node.title) or SIZES.get(node.type, (WIDTH, 0))
        if node.type == "MarkdownNote":
            item |= {"properties": {}, "color": "#432", "bgcolor": "#653", "widgets_values": [node.inputs["text"]]}
        else:
            info = object_info[node.type]
            if info["python_module"].partition(".")[0] != "custom_nodes":
                item["properties"]["cnr_id"] = "comfy-core"
            for name, type_, options in declared_inputs(info, node):
                value = node.inputs.get(name)
                if is_widget(type_, options):
                    item["widgets_values"].append(value)
                    if options.get("control_after_generate", name in ("seed", "noise_seed")):
                        item["widgets_values"].append(AFTER_SEED)
                    extra += MULTILINE if options.get("multiline") else 0
                    continue
                link = None
                if value is not None:
                    link = len(links) + 1
                    links.append([link, value.node.id, value.slot, node.id, len(item["inputs"]), type_])
                item["inputs"].append({"name": name, "type": type_, "link": link})
            for name, type_ in zip(info["output_name"], info["output"], strict=True):
                item["outputs"].append({"name": name, "type": type_, "links": []})
        slots = max(len(item["inputs"]), len(item["outputs"]))
        item["size"] = [
            width,
            slots * SLOT + len(item["widgets_values"]) * WIDGET * (node.type != "MarkdownNote") + extra + PADDING,
        ]
        nodes.append(item)
    by_id = {item["id"]: item for item in nodes}
    for link, origin, slot, *_ in links:
        by_id[origin]["outputs"][slot]["links"].append(link)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, graph.name)), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links,
        "groups": place(graph, by_id), "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def place(graph: Graph, items: dict[int, dict]) -> list[dict]:
    """Set every node's position, in rows and columns within its group, and return the groups drawn around them."""
    groups, x = [], 0
    for number, (title, columns) in enumerate(graph.groups):
        left = x
        x += PADDING
        rows = itertools.zip_longest(
            *[[items[node.id]["size"][1] for node in column] for column in columns], fillvalue=0
        )
        heights = [max(row) + TITLE + PADDING for row in rows]
        for column in columns:
            for row, node in enumerate(column):
                items[node.id]["pos"] = [x, GROUP_TITLE + TITLE + sum(heights[:row])]
            x += max(items[node.id]["size"][0] for node in column) + GAP
        x += PADDING - GAP
        groups.append(
            {
                "id": number + 1,
                "title": title,
                "bounding": [left, 0, x - left, GROUP_TITLE + sum(heights)],
                "color": COLOURS[number % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }  # fmt: skip
        )
        x += GROUP_GAP
    return groups


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_thumbnail(server: Server, graph: Graph) -> None:
    """Run the graph and save its comparison, 512 pixels wide."""
    from PIL import Image

    saved = [ref for ref in server.images(server.run(to_api(graph))) if ref["type"] == "output"]
    picture = Image.open(io.BytesIO(server.get_image(saved[0]))).convert("RGB")
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(FOLDER / f"{graph.name}.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--thumbnails", action="store_true", help="run the workflows and save their results as pictures"
    )
    options = parser.parse_args()
    with Server() as server:
        object_info = server.object_info()
        for graph in (make() for make in GRAPHS):
            write(FOLDER / f"{graph.name}.json", to_ui(graph, object_info))
            write(FOLDER / "api" / f"{graph.name.replace(' ', '_')}.json", to_api(graph))
            if options.thumbnails:
                write_thumbnail(server, graph)
            print(graph.name)


if __name__ == "__main__":
    main()
