"""The commands that find what carries an attribute, and write it out: capture, train, attribute, calibrate, export."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import DTYPES, Drawer, capture, noise_batches, open_store
from ..classifiers import frames_of, join_readings, labelled, seen
from ..experiments import Doses, calibrate, check_calibration
from ..files import DiffLensError, digest, write_whole, written
from ..locate import attribute_features, balancing_weights, in_frames, train_probes
from ..report import calibration_text, ranking_table, weighing_text
from ..sae import VALIDATION_PICTURES, hold_out, load_sae, measure_sae, save_sae, train_sae
from ..steer import as_stored, build_recipe, load_recipe, save_directions, save_recipe, weigh_latents
from ..targets import parse_target
from .console import Console
from .models import decided_by, draws_twice, open_classifier, open_model
from .study import Study

STORE, SAE, FOUND, RECIPE = "activations", "sae.safetensors", "found.safetensors", "recipe.safetensors"
DIRECTIONS = "directions.safetensors"


def run_capture(study: Study, console: Console) -> dict[str, Any]:
    """Draw pictures and keep what the site puts out."""
    options, model = study.capture, open_model(study)
    if options.dtype not in DTYPES:
        raise DiffLensError(f"capture: dtype is {options.dtype!r}, expected one of {', '.join(DTYPES)}.")
    evaluations = options.pictures * study.steps * (2 if draws_twice(model) else 1)
    console.say(
        f"draws {options.pictures} pictures of {' x '.join(map(str, model.shape))} in {study.steps} steps: "
        f"{evaluations} evaluations of the network, {study.batch} at once"
    )

    def room(needed: int) -> None:
        free = shutil.disk_usage(study.folder).free
        console.say(
            f"the store will take {needed / 1e9:.2f} GB in {study.folder / STORE}; {free / 1e9:.1f} GB are free"
        )
        if needed > free:
            raise DiffLensError(f"{study.folder} lacks room. Make some, or capture fewer pictures or steps.")

    def on_half(at_once: int) -> None:
        console.say(f"memory does not hold as many pictures at once; goes on with {at_once} (batch in the study)")

    with written(study.folder):
        study.folder.mkdir(parents=True, exist_ok=True)
    with console.progress(options.pictures, "pictures") as progress:
        store = capture(
            model, options.pictures, options.seed, study.batch, (study.site,), (options.start, options.end),
            options.dtype, study.folder / STORE, progress, room=room, on_half=on_half, twins=options.twins,
        )  # fmt: skip
    found = store.activations()
    console.say(
        f"kept {found.width} channels of {found.site} at {len(found.progress)} steps of {found.pictures} pictures"
    )
    figures = {"pictures": found.pictures, "steps": len(found.progress), "site": found.site, "width": found.width}
    return figures | {"evaluations": evaluations}


def run_train(study: Study, console: Console) -> dict[str, Any]:
    """Train an SAE on the store, under torchrun by several processes, and measure it."""
    options, device = study.train, study.computes_on
    activations = open_store(study.made(STORE, "capture")).activations()
    train, held_out = hold_out(activations)
    console.say(
        f"trains {options.latents} latents of {activations.width} channels, {options.steps} steps of {options.batch} "
        f"positions of {train.pictures} pictures, on {device}"
    )
    checkpoint = study.folder / f"sae_{digest(repr(options), activations.model)}.checkpoint"
    with console.progress(options.steps, "steps") as progress:

        def on_step(step: int, loss: Tensor, quality: Any) -> None:
            progress(step, f"held-out FVU {quality.fvu:.3f}" if quality else "")

        some = held_out.part(0, VALIDATION_PICTURES) if console.leads else None
        sae = train_sae(train, options, on_step, checkpoint, some, device)
    if not console.leads:
        return {}
    quality = asdict(measure_sae(sae.to(device), held_out))
    save_sae(study.folder / SAE, replace(sae, info={**sae.info, "held_out": quality}))
    checkpoint.unlink(missing_ok=True)
    console.say(
        f"on {held_out.pictures} pictures kept out of training: FVU {quality['fvu']:.3f}, L0 {quality['l0']:.1f}, dead "
        f"latents {quality['dead']:.1%}"
    )
    return quality


def run_attribute(study: Study, console: Console) -> dict[str, Any]:
    """Rank the latents by how much they carry the attribute, and make a recipe of the best."""
    options, model = study.attribution, open_model(study)
    classifier, classes = open_classifier(study)
    store, sae = open_store(study.made(STORE, "capture")), load_sae(study.made(SAE, "train"))
    activations, samples = store.activations(), store.samples()
    if not model.owns(activations.model):
        raise DiffLensError(f"{study.folder / STORE} was captured on another model than {study.model}. Capture again.")
    count, steps = len(samples), len(activations.progress)
    console.say(f"reads {study.attribute} off {count} pictures, then fits probes and levels at {steps} steps")
    read, frames = [], []
    with console.progress(count, "pictures") as progress:
        for batch in samples.split(study.batch):
            pictures = model.decode(batch)
            read.append(classifier.classify(pictures))
            frames.append(frames_of(classifier, pictures))
            progress(sum(len(next(iter(part.values()))) for part in read))
    found_frames = None if frames[0] is None else torch.cat(frames)  # type: ignore[arg-type]
    readings = join_readings(read)
    labels, others = labelled(readings, classifier.attributes, study.attribute)
    activations = in_frames(activations, found_frames, sae)
    weights = balancing_weights(labels, [indices for _, indices in others.values()])
    with console.progress(3 * steps, "steps") as progress:
        probes = train_probes(activations, sae, labels, study.attribute, classes, on_step=progress)
        found = attribute_features(
            activations, sae, probes, labels, options.method, weights, on_step=lambda step: progress(steps + step)
        )
        recipe = build_recipe(
            found, sae, probes, activations, labels, others, options.features_per_class, model.fingerprint,
            lambda step: progress(2 * steps + step), readings,
        )  # fmt: skip
    save_recipe(study.folder / FOUND, as_stored(recipe))
    write_whole(study.folder / RECIPE, (study.folder / FOUND).read_bytes())
    console.say(ranking_table(found, options.features_per_class))
    console.say(f"{len(recipe.features)} features into {study.folder / RECIPE}")
    shown = {name: int((labels == i).sum()) for i, name in enumerate(classes)}
    return {"features": len(recipe.features), "probe accuracy": max(probes.accuracy.tolist()), "pictures": shown}


def run_calibrate(study: Study, console: Console) -> dict[str, Any]:
    """Find the strengths with which the recipe meets the target, by drawing pictures."""
    options, model = study.calibrate, open_model(study)
    classifier, classes = open_classifier(study)
    found_file = study.made(FOUND, "attribute")
    recipe = load_recipe(found_file)
    target = parse_target(study.target, classes)
    check_calibration(recipe, target, options)
    weighing = options.weighed_by if study.spare_others else 0
    console.say(f"draws {options.budget + 2 * weighing} pictures at most to meet {study.target}")
    noise = next(noise_batches(model.shape, 2 * options.pictures, options.seed, 2 * options.pictures))
    readers = [study.path(name).read_bytes() for name in (study.classifier, study.face_detector) if name]
    settings = f"{options}{study.target}{decided_by(model)}"
    mark = digest(settings, found_file.read_bytes(), *readers)
    folder, weights = study.folder / f"calibration_{mark}", study.folder / f"weights_{mark}.safetensors"
    with console.progress(options.budget + 2 * weighing, "pictures") as progress:
        if weighing:
            recipe = weigh_latents(recipe, model, classifier, noise[:weighing], study.batch, progress, weights)

        def on_batch(done: int, doses: Doses) -> None:
            progress(2 * weighing + done)

        def read(images: Tensor) -> Tensor:
            return seen(classifier.classify(images), study.attribute)

        found = calibrate(recipe, Drawer(model, noise), read, target, options, study.batch, folder, on_batch)
    save_recipe(study.folder / RECIPE, found)
    shutil.rmtree(folder, ignore_errors=True)
    weights.unlink(missing_ok=True)
    record = found.info["calibration"]
    console.say(calibration_text(study.attribute, classes, record))
    if weighing:
        console.say(weighing_text(found.info["weighed"]))
    return record | {"strength": list(found.strength)}


def run_export(study: Study, console: Console) -> dict[str, Any]:
    """Write the recipe as plain directions, for programs that have torch alone."""
    recipe = load_recipe(study.made(RECIPE, "attribute"))
    path = study.folder / DIRECTIONS
    written = save_directions(path, recipe)
    if written.mode != recipe.mode:
        console.say(
            f"mode {recipe.mode} looks at each picture, which directions cannot: they are those of mode {written.mode} "
            "at strength 1"
        )
    console.say(
        f"{', '.join(written.classes)} at {', '.join(written.sites)}: {path.stat().st_size / 1e6:.1f} MB in {path}"
    )
    return {"mode": written.mode, "strength": written.strength, "sites": written.sites, "classes": written.classes}
