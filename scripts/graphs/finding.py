"""Workflows that find out: features, the place in the model, what counts, and why a recipe fails."""

from __future__ import annotations

from .graph import Graph
from .pieces import before_and_after, experiment, find_features, load_classifier, load_model, measure, sampler, steer


def find_the_bias_features() -> Graph:
    graph = Graph("02 find the bias features, train an SAE")
    graph.group("Start here")
    graph.note(
        "# From a model alone to a recipe\n\n"
        "This is the whole way, about seven minutes on two processor cores:\n\n"
        "1. **Capture** draws portraits and records what goes through the middle of the model. It goes on until the "
        "rarest class has 100 portraits.\n"
        "2. **Train SAE** takes the records apart into 1024 features, few of them active at a time.\n"
        "3. **Classify** reads each portrait; **Train Probes** learns to read the same from the record, step by "
        "step.\n"
        "4. **Attribute Features** ranks the features by how much they decide the attribute, and makes a "
        "**recipe** of the best.\n"
        "5. **Calibrate** finds the strengths with which the recipe meets the mix, and checks them on fresh noises.\n"
        "6. **Steer** uses the recipe on portraits from another seed, and the report measures the effect.\n\n"
        "The recipe is saved and then appears in Load Recipe.\n\n"
        "**Try next**\n"
        "- *attribute* in Capture, Classify Images and in the report: age, skin_tone\n"
        "- a name in *save_as* of Train SAE keeps the SAE\n"
        "- more pictures of every class and more steps: less of the rest changes"
    )
    graph.group("1 Draw and record")
    model = load_model(graph)
    batch = graph.add("EmptyLatentImage", "Pictures in a batch", width=64, height=64, batch_size=32)
    classifier = load_classifier(graph)
    graph.column()
    captured = graph.add(
        "DiffLensCapture", None, model=model[0], positive=model[1], latent_image=batch[0], vae=model[2],
        pictures=256, steps=20, sampler_name="euler", scheduler="simple", seed=0, site="middle_block",
        start_percent=0.0, end_percent=1.0, dtype="float16", save_as="", cfg=1.0, classifier=classifier[0],
        attribute="presentation", per_class=100, twins=1,
    )  # fmt: skip
    labels = graph.add("DiffLensClassify", None, images=captured[1], classifier=classifier[0], attribute="presentation")
    found = find_features(graph, model[0], captured, labels, latents=1024, steps=1500, batch_size=2048, save_as="")
    graph.group("4 Find the strengths")
    calibrated = graph.add(
        "DiffLensCalibrate", None, model=model[0], positive=model[1], latent_image=batch[0], vae=model[2],
        classifier=classifier[0], recipe=found[0], target="uniform", budget=640, tolerance=0.02, clear=0.999,
        only_where_needed=False, steps=20, sampler_name="euler", scheduler="simple", seed=1, cfg=1.0,
        spare_others=True,
    )  # fmt: skip
    graph.add("PreviewAny", "Was the mix met?", source=calibrated[2])
    graph.group("5 Steer other pictures by them")
    graph.add(
        "DiffLensSaveRecipe", None, recipe=calibrated[0], name="my_presentation", author="", licence="", model_name=""
    )
    before_and_after(graph, model, calibrated, classifier, batch, 16)
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
        "- *strength* 1: now nearly all portraits turn\n"
        "- *attribute*: presentation, skin_tone\n"
        "- *sites* empty: all that the node proposes\n"
        "- your own model: prompts into positive and negative, *cfg* as you use it"
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
    graph.save("Save the chart", scan[2], "difflens/sites")
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
        "**Explore Features** shows those that were kept. Its button opens them as cards: the portraits in which each "
        "fires most, and where. Untick some, and press *Preview* there: only the pictures beside it are drawn anew.\n\n"
        "Then eight portraits are drawn three times from the same noise: as the model likes, steered to *feminine* by "
        "all features, and by the third of them that was kept and ticked. The report compares the last with the first. "
        "What the classifier takes for a class may still be half of another, so press the button on **Judge by Eye**: "
        "it shows the portraits by all and by the best features side by side, not saying which is which. Run again, "
        "and the report counts what you said.\n\n"
        "**Try next**\n"
        "- *features_per_class* in Rank by Effect: 5, 60\n"
        "- *change*: ablate\n"
        "- more *pictures*: the whiskers, one standard error, get shorter\n"
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
    graph.group("Look at the best, and choose")
    captured = graph.add(
        "DiffLensCapture", None, model=model[0], positive=model[1], latent_image=batch[0], vae=model[2], pictures=64,
        steps=10, sampler_name="euler", scheduler="simple", seed=2, site="middle_block", start_percent=0.0,
        end_percent=1.0, dtype="float16", save_as="", cfg=1.0, attribute="presentation", per_class=100, twins=1,
    )  # fmt: skip
    labels = graph.add("DiffLensClassify", None, images=captured[1], classifier=classifier[0], attribute="presentation")
    graph.column()
    explored = graph.add(
        "DiffLensExplore", None, activations=captured[0], images=captured[1], recipe=ranked[0], labels=labels[0],
        choice="", save_as="",
    )  # fmt: skip
    graph.group("Steer by all and by the best")
    full = steer(graph, "Steer by all", model[0], recipe[0], "feminine")
    short = steer(graph, "Steer by the best", model[0], explored[0], "feminine")
    graph.column()
    titles = ["Before", "All features", "The best"]
    models = [model[0], full[0], short[0]]
    drawn = [sampler(graph, name, node, model[1], latent, 7) for name, node in zip(titles, models, strict=True)]
    graph.column()
    pictures = [graph.add("VAEDecode", None, samples=node[0], vae=model[2]) for node in drawn]
    graph.add("PreviewImage", "What the explorer previews", images=pictures[-1][0])
    judged = graph.add(
        "DiffLensJudge", None, first=pictures[1][0], second=pictures[2][0], names="\n".join(titles[1:]),
        attribute="presentation", save_as="difflens/judgements", seed=0, catch_pairs=0,
    )  # fmt: skip
    measure(graph, "presentation", "feminine", classifier[0], [node[0] for node in pictures], titles, 8, short[1])
    (report,) = (node for node in graph.nodes if node.type == "DiffLensReport")
    report.inputs["judgements"] = judged[0]
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
        "The second check needs labelled activations, as in workflow 02; the control leaves out the first, "
        "which would say the same again.\n\n"
        "**Try next**\n"
        "- a recipe of your own\n"
        "- *avatars_age*\n"
        "- Capture Activations and Classify Images into the first Diagnose\n"
        "- *pictures* 16: surer, and twice the time"
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
        graph.save(f"{title}: save the chart", node[2], "difflens/diagnosis")
    return graph
