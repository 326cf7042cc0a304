"""Workflows that steer by the recipes that come with the pack."""

from __future__ import annotations

from .graph import Graph
from .pieces import before_and_after, experiment, load_classifier, load_model, measure, report_on, sampler, steer


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
    return graph


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
