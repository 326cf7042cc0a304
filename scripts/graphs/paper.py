"""The paper's own two set-ups, for those who bring its weights."""

from __future__ import annotations

from .graph import Graph, Link, Node
from .pieces import load_classifier, load_model, measure, steer
from .sources import FAIRFACE, P2, PAPER, SD15, bring


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
        f"{bring(P2, 'P2')}"
        f"- *models/difflens_saes/p2/* with *cfg.json* and *sae.safetensors*: [the paper]({PAPER})\n"
        f"- *models/difflens_saes/p2/gender/* with *male.pt* and *female.pt*: [the paper]({PAPER})\n"
        f"{bring(FAIRFACE, 'FairFace')}\n"
        "50 DDIM steps, eta 1. **Reference Sampler** runs the model twice a step, as the reference code does. The "
        "paper's scale of 1.43 is a strength of 0.43.\n\n"
        "**Try next**\n"
        "- KSamplerSelect *euler* in place of Reference Sampler: half the time, and the edit acts in full\n"
        "- age: features 30, scale 1, 1, 3 (strength *0, 0, 2*); race: *30, 100, 30, 30*, strength *0, 4, 0.5, 0.5*\n"
        "- the paper measures 10 000 pictures"
    )
    graph.group("Model, SAE, features and classifier")
    model = load_model(graph, P2)
    sae = graph.add("DiffLensLoadSAE", None, sae_name="p2", site="middle_block")
    features = graph.add(
        "DiffLensLoadFeatures", None, folder="p2/gender", sae=sae[0], attribute="gender", classes="male, female",
        features_per_class="30", mode="scale", strength="0.43, 0",
    )  # fmt: skip
    classifier = load_classifier(graph, FAIRFACE)
    graph.group("Draw the same pictures without and with steering")
    steered = steer_by_files(graph, model[0], sae, features)
    latent = graph.add("EmptyLatentImage", "How many pictures", width=256, height=256, batch_size=8)
    sampler = graph.add("DiffLensReferenceSampler", None, eta=1.0)
    sigmas = graph.add("DiffLensDDIMSigmas", None, model=model[0], steps=50, spacing="ddim")
    graph.column()
    pictures = paper_pair(graph, [model[0], steered[0]], sampler, sigmas, model[1], model[1], latent, model[2], 1.0)
    measure(
        graph, "gender", "uniform", classifier[0], [node[0] for node in pictures], ["Before", "After"], 8, steered[1]
    )
    return graph


def paper_stable_diffusion() -> Graph:
    graph = Graph("06 paper Stable Diffusion")
    graph.group("Start here")
    graph.note(
        "# The paper's Stable Diffusion set-up\n\n"
        "SD 1.5, steered by the SAE and the features of age that the paper's authors published. Bring the files:\n\n"
        f"{bring(SD15, 'Stable Diffusion 1.5')}"
        f"- *models/difflens_saes/sd15/* with *cfg.json* and *sae.safetensors*: [the paper]({PAPER})\n"
        f"- *models/difflens_saes/sd15/age/* with *young.pt*, *adult.pt* and *old.pt*: [the paper]({PAPER})\n"
        f"{bring(FAIRFACE, 'FairFace')}\n"
        "The SAE reads the whole 8 x 8 map at once, so draw at 512 x 512. Only the prompt's half is steered. The "
        "paper adds 30 to 10 features of young, and 50 to 30 features of old.\n\n"
        "**Try next**\n"
        "- its other prompts: firefighter, receptionist, nurse; 500 pictures each\n"
        "- a YuNet file as *face_detector*: the paper cuts out faces before it classifies them"
    )
    graph.group("Model, SAE, features and classifier")
    model = graph.add("CheckpointLoaderSimple", None, ckpt_name=SD15)
    sae = graph.add("DiffLensLoadSAE", None, sae_name="sd15", site="middle_block")
    features = graph.add(
        "DiffLensLoadFeatures", None, folder="sd15/age", sae=sae[0], attribute="age", classes="young, adult, old",
        features_per_class="10, 0, 30", mode="add own fixed", strength="30, 0, 50",
    )  # fmt: skip
    classifier = load_classifier(graph, FAIRFACE)
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
    measure(graph, "age", "uniform", classifier[0], [node[0] for node in pictures], ["Before", "After"], 6, steered[1])
    return graph
