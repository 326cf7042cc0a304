"""Workflows that steer by the recipes that come with the pack."""

from __future__ import annotations

from .graph import NOTE, Graph, Link, Node
from .pieces import compare, draw_twice, experiment, load_classifier, load_model, measure, report_on, sampler, steer

NOT_A_PERSON = "An attribute is what a classifier sees in a picture, not what a person is."


def debias(graph: Graph, model: Link, recipe: str) -> Node:
    return graph.add(
        "DiffLensDebias", None, model=model, **{"recipe": recipe, "recipe.mix": "even mix", "strength": 1.0}
    )


def prompted(graph: Graph, name: str) -> tuple[Node, Node, Node]:
    """A shipped model that draws by prompt, the model behind its recipe for presentation, and its classifier."""
    graph.group("Model, recipe and classifier")
    model = graph.add("DiffLensLoadPromptedModel", None, model_name=f"{name}.safetensors")
    steered = debias(graph, model[0], f"{name}_presentation.safetensors")
    return model, steered, load_classifier(graph, f"{name}.safetensors")


def measured(graph: Graph, name: str, classifier: Node, drawn: Node, steered: Node) -> None:
    """A column with the report on pictures of `draw_twice`, and one with it in words."""
    graph.column()
    report = report_on(
        graph, f"{name}, measured", classifier[0], "as asked", "as asked", drawn[0], drawn[1], steered[1],
        f"difflens/report {name.lower()}",
    )  # fmt: skip
    graph.column()
    graph.add("PreviewAny", f"{name}: the report in words", source=report[0])


def start_here() -> Graph:
    graph = Graph("00 start DiffLens, fairness and diversity")
    graph.group("Start here")
    graph.note(
        "# Start here\n\n"
        "A small model draws portraits by prompt. Asked for a doctor, it draws nearly only masculine ones.\n\n"
        "Press **Run**. The same 16 pictures are drawn twice: above as the model likes, below behind **Debias**, "
        "which asks for a fair mix. What nobody asked to change stays.\n\n"
        "**Try next**\n"
        "- the prompt: *portrait of a nurse*, *portrait of a firefighter*\n"
        "- *mix* in Debias: only one class, or your own shares\n"
        "- *recipe* in Debias: the prompted avatars' age\n"
        "- another *seed*\n\n"
        "In a graph of your own you need **Debias** alone: put it between the model and the sampler. The next "
        f"workflow measures as well.\n\n{NOT_A_PERSON}"
    )
    graph.group("A prompt in, pictures before and after out")
    model = graph.add("DiffLensLoadPromptedModel", None, model_name="prompted_avatars.safetensors")
    prompt = graph.add("CLIPTextEncode", "Prompt", text="portrait of a doctor", clip=model[1])
    graph.column()
    steered = debias(graph, model[0], "prompted_avatars_presentation.safetensors")
    drawn = graph.add(
        draw_twice(7, 16, prompted=True), "Draw before and after", model=model[0], steered=steered[0], prompt=prompt[0],
        clip=model[1], vae=model[2], seed=7, pictures=16,
    )  # fmt: skip
    graph.column()
    for node in graph.nodes:  # all of it fits on a screen
        node.width = 280 if node.type == NOTE else 270
    shown = compare(graph, [drawn[0], drawn[1]], ["Before", "After"], 8, "Before and after")
    form = [(prompt, "text"), (steered, "recipe"), (steered, "recipe.mix"), (steered, "strength")]
    graph.form = [*form, (drawn, "seed"), (drawn, "pictures")], [shown]
    return graph


def debias_the_avatars() -> Graph:
    graph = Graph("01 debias the avatars")
    graph.group("Start here")
    graph.note(
        "# Turn a bias down\n\n"
        "The avatars are a small model that draws portraits. It learned from pictures of which four in five show "
        "a masculine presentation, and draws the same.\n\n"
        "Press **Run**. The same 16 portraits are drawn twice from the same noise: once as the model likes, once "
        "behind **Debias**. It asks the portraits for one class and the other in turn. One that shows its class anyway "
        "hardly changes; now and then one of the rare class is asked for the other. So somewhat more change than had "
        "to, and the report says how many. Workflow 07 changes the fewest.\n\n"
        "**Compare Images** shows both, **Fairness Report** measures them. The discrepancy is the distance from a fair "
        "mix: 0 is perfect. The report also writes a page to print or to send, into the folder *difflens* in ComfyUI's "
        "output.\n\n"
        "**Try next**\n"
        "- another *recipe* in Debias: age, skin tone\n"
        "- *mix*: only one class, or your own shares\n"
        "- another *seed*\n\n"
        f"{NOT_A_PERSON}"
    )
    graph.group("Model, recipe and classifier")
    model = load_model(graph)
    steered = debias(graph, model[0], "avatars_presentation.safetensors")
    classifier = load_classifier(graph)
    graph.group("Draw")
    drawn = graph.add(
        draw_twice(7, 16, prompted=False), "Draw before and after", model=model[0], steered=steered[0],
        prompt=model[1], vae=model[2], seed=7, pictures=16,
    )  # fmt: skip
    measure(graph, "as asked", "as asked", classifier[0], [drawn[0], drawn[1]], ["Before", "After"], 8, steered[1])
    shown = [node for node in graph.nodes if node.type in ("DiffLensCompare", "DiffLensReport")]
    form = [(steered, "recipe"), (steered, "recipe.mix"), (steered, "strength"), (drawn, "seed"), (drawn, "pictures")]
    graph.form, graph.opens_as_form = (form, shown), True
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
        "The report compares the strongest row with strength 0. *success* is the share that shows what was asked "
        "for; *kept* is the share that kept its other attributes.\n\n"
        "**Try next**\n"
        "- *target* in every Steer: *young*\n"
        "- another recipe, with one of its classes as target\n"
        "- *start_percent* 0.3 in Steer: later steps alone change less"
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
    measure(graph, "age", "senior", classifier[0], [node[0] for node in pictures], names, 8, steered[-1][1])
    return graph


def debias_a_prompt() -> Graph:
    graph = Graph("04 debias a prompt, stereotypes of occupations")
    jobs = ("doctor", "nurse", "firefighter", "receptionist")
    graph.group("Start here")
    graph.note(
        "# One recipe for four prompts\n\n"
        "This small model draws by prompt. It learned that doctors and firefighters look masculine, nurses and "
        "receptionists feminine, and each occupation has its usual age.\n\n"
        "Press **Run**. For each prompt the same 16 portraits are drawn twice: as the model likes, and behind "
        "**Debias**, which asks for a fair mix of presentations. A report follows for every prompt. Coat, helmet or "
        "headset should stay.\n\n"
        "**Try next**\n"
        "- the recipe *prompted_avatars_age* in Debias\n"
        "- other prompts: *portrait of a smiling person*, *an old nurse with glasses*\n"
        "- another *cfg*, inside *Draw before and after*: more guidance, more bias\n\n"
        f"{NOT_A_PERSON}"
    )
    model, steered, classifier = prompted(graph, "prompted_avatars")
    twice, rows = draw_twice(7, 16, prompted=True), {}
    for job in jobs:
        graph.group(job.title())
        prompt = graph.add("CLIPTextEncode", job.title(), text=f"portrait of a {job}", clip=model[1])
        drawn = graph.add(
            twice, f"Draw {job}s before and after", model=model[0], steered=steered[0], prompt=prompt[0], clip=model[1],
            vae=model[2], seed=7, pictures=16,
        )  # fmt: skip
        rows |= {f"{job.title()}, before": drawn[0], f"{job.title()}, after": drawn[1]}
        measured(graph, job.title(), classifier, drawn, steered)
    graph.group("All side by side")
    grid = compare(graph, [*rows.values()], [*rows], 16)
    graph.save("Save the comparison", grid[0], "difflens/comparison")
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
        "- *target* of Plan Targets, a line for each recipe: *uniform*, *1, 2, 1*, *uniform*\n"
        "- **Calibrate** behind a Load Recipe finds its strengths for your target. It draws 1280 portraits, some "
        "three minutes on two processor cores\n"
        "- another attribute in the report\n\n"
        f"{NOT_A_PERSON}"
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
    measure(graph, "skin_tone", "uniform", classifier[0], [before[0], after[0]], ["Before", "After"], 16, plan[0])
    (report,) = (node for node in graph.nodes if node.type == "DiffLensReport")
    report.inputs["joint_with"] = "presentation, age"
    graph.group("Steer one, watch the others")
    batch = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    cross = experiment(graph, "DiffLensCrossEffects", model, batch, classifier, **sockets, pictures=64)
    graph.column()
    graph.add("PreviewAny", "The matrix", source=cross[0])
    return graph


def any_size() -> Graph:
    graph = Graph("12 any size")
    graph.group("Start here")
    graph.note(
        "# One recipe, people anywhere\n\n"
        "This small model draws people in scenes: one figure, small or large, anywhere in the picture. **Prompt List** "
        "asks for doctors at eight places, one prompt a picture.\n\n"
        "Press **Run**. Pictures of three shapes are drawn twice from the same noise: as the model likes, and behind "
        "**Debias**. Its recipe was learned from twins, pictures of the same noise by prompts that differ in one word, "
        "of two shapes, 96 x 64 and 64 x 96. It sees in each picture what to change where; the room should stay.\n\n"
        "**Try next**\n"
        "- *nurse* or *firefighter* in the prompts, or several of them\n"
        "- *width* and *height* in *Draw before and after*: multiples of 8\n\n"
        "Small figures turn less often than large ones. Where long hair comes or goes it leaves smears, some of "
        "them dark and over part of the face. The model is in DiffLens' repository alone, not in the package of the "
        "Registry.\n\n"
        f"{NOT_A_PERSON}"
    )
    model, steered, classifier = prompted(graph, "scenes")
    graph.column()
    places = ("wide, left", "wide, middle", "wide, right", "medium, left", "medium, middle", "medium, right",
              "close, middle", "close, middle")  # fmt: skip
    prompts = graph.add(
        "DiffLensPrompts", "A prompt a picture", clip=model[1], text="\n".join(f"a doctor, {place}" for place in places)
    )
    twice = draw_twice(7, 16, prompted=True, sized=True)
    for name, width, height in (("Square", 64, 64), ("Tall", 64, 96), ("Wide", 128, 96)):
        graph.group(f"{name}: {width} x {height}")
        drawn = graph.add(
            twice, f"Draw {name.lower()} pictures before and after", model=model[0], steered=steered[0],
            prompt=prompts[0], clip=model[1], vae=model[2], seed=7, pictures=16, width=width, height=height,
        )  # fmt: skip
        graph.column()
        grid = compare(graph, [drawn[0], drawn[1]], ["Before", "After"], 8, f"{name}, before and after")
        graph.save(f"Save the {name.lower()} comparison", grid[0], f"difflens/comparison {name.lower()}")
        measured(graph, name, classifier, drawn, steered)
    return graph
