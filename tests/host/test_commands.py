"""The commands and the nodes find the same on the avatars, from the same seeds (see `inside.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from difflens_core.commands.__main__ import main
from difflens_core.commands.cli import DONE, MISSED
from difflens_core.commands.pictures import read_folder
from difflens_core.sae import load_sae
from difflens_core.steer import load_recipe

AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
PICTURES, STEPS, BATCH, LATENTS, K, TRAINED, FEATURES, DRAWN, BUDGET = 32, 4, 8, 64, 8, 20, 8, 16, 80
ATTRIBUTE, TARGET = "expression", "neutral: 1, smile: 1"
STUDY = f"""
model = "{AVATARS.as_posix()}/difflens_models/avatars.safetensors"
classifier = "{AVATARS.as_posix()}/difflens_classifiers/avatars.safetensors"
attribute = "{ATTRIBUTE}"
target = "{TARGET}"
site = "middle_block"
steps = {STEPS}
batch = {BATCH}
capture = {{ pictures = {PICTURES} }}
train = {{ latents = {LATENTS}, k = {K}, steps = {TRAINED}, batch = 256 }}
attribution = {{ features_per_class = {FEATURES} }}
calibrate = {{ budget = {BUDGET} }}
steer = {{ pictures = {DRAWN} }}
"""


def test_commands_and_nodes_find_the_same(inside, tmp_path, capsys):
    """From the same store to the bit; from their own pictures to a few millionths, as ComfyUI's sampling rounds
    otherwise: that turns the last bit of some numbers of a store in fp16, but no choice.
    """
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
    stored = node("difflens_core.activations").open_store(made / "activations").activations()
    torch.testing.assert_close(stored.values[:], activations.values[:], atol=2e-3, rtol=2e-3)
    classifier = node("difflens_core.classifiers").load_classifier(AVATARS / "difflens_classifiers/avatars.safetensors")
    labels = node("nodes.classify").ClassifyImages.execute(images, classifier, ATTRIBUTE).result[0]
    sae, found = load_sae(made / "sae.safetensors"), load_recipe(made / "found.safetensors")
    for source, exact in ((stored, {"atol": 0, "rtol": 0}), (activations, {"atol": 1e-4, "rtol": 1e-4})):
        trained, _, quality = (
            node("nodes.train").TrainSAE.execute(source, LATENTS, K, TRAINED, 256, 0.001, 0, "").result
        )  # fmt: skip
        torch.testing.assert_close(trained.encoder, sae.encoder, **exact)
        assert quality.partition(" (")[0] in printed["train"]
        probes = node("nodes.attribute").TrainProbes.execute(source, trained, labels).result[0]
        recipe, _, table = (
            node("nodes.attribute")
            .AttributeFeatures.execute(model, source, trained, probes, labels, "class mean difference", FEATURES)
            .result
        )
        assert found.features.tolist() == recipe.features.tolist()
        assert found.model == recipe.model and (found.start, found.end) == (recipe.start, recipe.end)
        assert source is not stored or table in printed["attribute"]

    assert main(["steer", str(study)]) == 0
    told, sampling = capsys.readouterr().out, (STEPS, "euler", "simple", 1, "middle_block")
    steered, targets = node("nodes.steer").Steer.execute(
        model, found, TARGET, 1.0, "from recipe", 0.0, 1.0, 1, 0
    ).result  # fmt: skip
    before, after = (
        node("nodes.capture").CaptureActivations.execute(of, *sampled[1:], DRAWN, *sampling).result[1]
        for of in (model, steered)
    )
    for folder, pictures in (("before", before), ("after", after)):
        drawn = torch.from_numpy(read_folder(made / folder)).float() / 255
        assert (drawn - pictures).abs().max() < 0.02 and (drawn - pictures).abs().mean() < 2e-3
    report = node("nodes.report").FairnessReport.execute(classifier, ATTRIBUTE, TARGET, before, after, targets)
    assert report.result[0].partition("\n")[0] in told

    by_node, _, text, record = (
        node("nodes.calibrate")
        .Calibrate.execute(*sampled, classifier, found, TARGET, BUDGET, 0.02, 0.999, False, STEPS, "euler", "simple", 0)
        .result
    )
    assert main(["calibrate", str(study)]) == (DONE if json.loads(record)["reached"] else MISSED)
    by_command = load_recipe(made / "recipe.safetensors")
    assert text in capsys.readouterr().out and by_command.strength == by_node.strength
    torch.testing.assert_close(by_command.weight, by_node.weight, atol=1e-3, rtol=1e-3)
    doses = by_command.info["calibration"]["doses"]
    assert max(map(len, doses.values())) > 1
    torch.testing.assert_close(doses, json.loads(record)["doses"], atol=1e-5, rtol=1e-3)
