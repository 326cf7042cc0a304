"""The commands and the nodes find the same on the avatars, from the same seeds (see `inside.py`)."""

from __future__ import annotations

from pathlib import Path

import torch

from difflens_core.activations import open_store
from difflens_core.commands import main
from difflens_core.commands.pictures import read_folder
from difflens_core.sae import load_sae
from difflens_core.steer import load_recipe

AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
PICTURES, STEPS, BATCH, LATENTS, K, TRAINED, FEATURES, DRAWN = 32, 4, 8, 64, 8, 20, 8, 16
STUDY = f"""
model = "{AVATARS.as_posix()}/difflens_models/avatars.safetensors"
classifier = "{AVATARS.as_posix()}/difflens_classifiers/avatars.safetensors"
attribute = "expression"
site = "middle_block"
steps = {STEPS}
batch = {BATCH}
capture = {{ pictures = {PICTURES} }}
train = {{ latents = {LATENTS}, k = {K}, steps = {TRAINED}, batch = 256 }}
attribution = {{ features_per_class = {FEATURES} }}
steer = {{ pictures = {DRAWN} }}
"""


def test_commands_and_nodes_find_the_same(inside, tmp_path, capsys):
    """To the last digit that is printed: ComfyUI rounds otherwise while it samples, by a few millionths."""
    study, node = tmp_path / "study.toml", inside.pack_module
    study.write_text(STUDY)
    printed = {}
    for command in ("capture", "train", "attribute"):
        assert main([command, str(study)]) == 0
        printed[command] = capsys.readouterr().out
    made = study.with_suffix("")

    name = next(name for name in inside.host.list_models() if "avatars" in name)
    model, positive, vae, _ = node("nodes.models").LoadModel.execute(name).result
    latent = {"samples": torch.zeros(BATCH, 3, 64, 64)}
    sampled = (model, positive, latent, vae)
    activations, images = (
        node("nodes.capture")
        .CaptureActivations.execute(*sampled, PICTURES, STEPS, "euler", "simple", 0, "middle_block")
        .result
    )
    torch.testing.assert_close(
        open_store(made / "activations").activations().values[:], activations.values[:], atol=2e-3, rtol=2e-3
    )
    sae, _, quality = node("nodes.train").TrainSAE.execute(activations, LATENTS, K, TRAINED, 256, 0.001, 0, "").result
    torch.testing.assert_close(load_sae(made / "sae.safetensors").encoder, sae.encoder, atol=1e-4, rtol=1e-4)
    assert quality.partition(" (")[0] in printed["train"]
    classifier = node("difflens_core.classifiers").load_classifier(AVATARS / "difflens_classifiers/avatars.safetensors")
    labels = node("nodes.classify").ClassifyImages.execute(images, classifier, "expression").result[0]
    probes = node("nodes.attribute").TrainProbes.execute(activations, sae, labels).result[0]
    recipe, _, table = (
        node("nodes.attribute")
        .AttributeFeatures.execute(model, activations, sae, probes, labels, "class mean difference", FEATURES)
        .result
    )
    found = load_recipe(made / "found.safetensors")
    assert table in printed["attribute"] and found.features.tolist() == recipe.features.tolist()
    assert found.model == recipe.model and (found.start, found.end) == (recipe.start, recipe.end)

    assert main(["steer", str(study)]) == 0
    told, sampling = capsys.readouterr().out, (STEPS, "euler", "simple", 1, "middle_block")
    steered, targets = node("nodes.steer").Steer.execute(
        model, found, "uniform", 1.0, "from recipe", 0.0, 1.0, 1, 0
    ).result  # fmt: skip
    before, after = (
        node("nodes.capture").CaptureActivations.execute(of, *sampled[1:], DRAWN, *sampling).result[1]
        for of in (model, steered)
    )
    for folder, pictures in (("before", before), ("after", after)):
        drawn = torch.from_numpy(read_folder(made / folder)).float() / 255
        assert (drawn - pictures).abs().max() < 0.02 and (drawn - pictures).abs().mean() < 2e-3
    report = node("nodes.report").FairnessReport.execute(
        classifier, "expression", "uniform", before, after, targets
    )  # fmt: skip
    assert report.result[0].partition("\n")[0] in told
