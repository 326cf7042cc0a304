"""The commands one after the other, on small random pipelines of every kind, as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difflens_core.activations import noise_batches, open_store
from difflens_core.classifiers import AttributeClassifier, save_classifier
from difflens_core.commands.__main__ import main
from difflens_core.commands.models import open_model
from difflens_core.commands.study import read_study
from difflens_core.files import load_tensors
from difflens_core.sae import load_sae
from difflens_core.steer import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pipelines import KINDS, PROMPTLESS, saved  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLES = """
[capture]
pictures = 12
[train]
latents = 64
k = 4
steps = 20
batch = 64
[attribution]
features_per_class = 8
[calibrate]
budget = 80
[steer]
pictures = 6
"""


def study_of(folder: Path, kind: str, **more) -> Path:
    """A study of a pipeline, with a random classifier of which half of the pictures show one class."""
    model = saved(kind, folder)
    _, site, settings = KINDS[kind]
    keys = {
        "model": str(model), "classifier": "classifier.safetensors", "attribute": "look", "site": site, "steps": 3,
        "batch": 4, "spare_others": False, **({} if kind in PROMPTLESS else {"prompts": ["a b", "c d"]}),
    } | settings | more  # fmt: skip
    path = folder / "study.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()) + TABLES)
    torch.manual_seed(0)
    classifier = AttributeClassifier({"look": ("one", "other"), "ground": ("light", "dark")}).eval()
    sampler = open_model(read_study(path))
    noise = next(noise_batches(sampler.shape, 12, 0, 12))
    with torch.inference_mode():
        pictures = sampler.decode(sampler.sample(noise, torch.arange(12))).movedim(3, 1)
        for attribute, logits in classifier.logits(pictures).items():
            head, apart = classifier.heads[attribute], logits[:, 1] - logits[:, 0]
            head.bias[1] -= apart.median()
            for weight in head.parameters():
                weight *= 3 / apart.std()
    save_classifier(folder / "classifier.safetensors", classifier, {})
    return path


def figures(capsys, *arguments: object) -> dict:
    """What a command prints for programs."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code in (0, 3), err
    return json.loads(out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_way(kind, tmp_path, capsys):
    study = study_of(tmp_path / kind, kind)
    folder = read_study(study).folder
    captured, twice = figures(capsys, "capture", study), 2 if kind in ("sd15", "sdxl", "sd3") else 1
    assert captured["pictures"] == 12 and captured["evaluations"] == 12 * 3 * twice
    assert len(open_store(folder / "activations").samples()) == 12
    assert figures(capsys, "train", study)["fvu"] > 0
    assert sum(figures(capsys, "attribute", study)["pictures"].values()) == 12
    found = figures(capsys, "calibrate", study)
    assert load_recipe(folder / "recipe.safetensors").info["calibration"]["why"] == found["why"]
    report = figures(capsys, "steer", study)
    assert report["n"] == 6 and report["after"] and (folder / "report.html").exists()
    pictures = [
        np.stack([np.array(Image.open(path)) for path in sorted((folder / name).glob("*.png"))])
        for name in ("before", "after")
    ]
    assert pictures[0].shape == pictures[1].shape and len(pictures[0]) == 6 and (pictures[0] != pictures[1]).any()
    exported, written = figures(capsys, "export", study), load_tensors(folder / "directions.safetensors", "directions")
    assert (
        exported["mode"] == "add"
        and written[0].keys() == {KINDS[kind][1]}
        and written[1]["classes"] == ["one", "other"]
    )
    again = figures(capsys, "report", study, folder / "before", folder / "after")
    assert again["before"] == report["before"] and again["changes"] == report["changes"]


def run(*arguments: object, processes: int = 0) -> subprocess.Popen:
    """A command in a process of its own, or in several under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *launch, "-m", "difflens_core.commands", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_make_what_one_makes(tmp_path, capsys):
    """They draw the pictures of one store in turn and train one SAE."""
    alone, both = (study_of(tmp_path / name, "avatars") for name in ("alone", "both"))
    for study, processes in ((alone, 0), (both, 2)):
        for command in ("capture", "train"):
            process = run(command, study, processes=processes)
            assert process.wait(300) == 0, process.communicate()
    stores = [open_store(read_study(study).folder / "activations") for study in (alone, both)]
    torch.testing.assert_close(stores[0].activations().values[:], stores[1].activations().values[:])
    saes = [load_sae(read_study(study).folder / "sae.safetensors") for study in (alone, both)]
    torch.testing.assert_close(saes[0].encoder, saes[1].encoder, atol=1e-4, rtol=1e-4)
    assert figures(capsys, "attribute", both)["features"] == figures(capsys, "attribute", alone)["features"]


def test_a_capture_that_is_cut_off_goes_on(tmp_path):
    study = study_of(tmp_path / "cut", "avatars", batch=1, steps=400)
    shards, process = read_study(study).folder / "activations", run("capture", study)
    while not [*shards.glob("shard_*")]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "cut off. Run the same command again, and it goes on." in err
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard_*")}
    assert 0 < len(kept) < 12
    assert main(["capture", str(study)]) == 0
    assert all((shards / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_pictures_that_were_drawn_by_other_settings_are_drawn_anew(tmp_path, capsys):
    study = study_of(tmp_path / "steer", "avatars")
    for command in ("capture", "train", "attribute"):
        figures(capsys, command, study)
    figures(capsys, "steer", study)
    folder = read_study(study).folder

    def times(name: str) -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted((folder / name).glob("*.png"))]

    before, after = times("before"), times("after")
    figures(capsys, "steer", study)
    assert (times("before"), times("after")) == (before, after)
    study.write_text(study.read_text().replace("[steer]", "[steer]\nstrength = 2"))
    figures(capsys, "steer", study)
    assert times("before") == before and not set(times("after")) & set(after)
    before, after = times("before"), times("after")
    study.write_text(study.read_text().replace("steps = 3", "steps = 4"))
    figures(capsys, "steer", study)
    assert not set(times("before")) & set(before) and not set(times("after")) & set(after)
    before, after = times("before"), times("after")
    study.write_text(study.read_text().replace("features_per_class = 8", "features_per_class = 2"))
    figures(capsys, "attribute", study)
    figures(capsys, "steer", study)
    assert times("before") == before and not set(times("after")) & set(after)


def test_what_does_not_fit_is_said_in_one_sentence(tmp_path, capsys):
    study = study_of(tmp_path / "wrong", "unconditional")
    for changed, said in (
        ({'attribute = "look"': 'attribute = "age"'}, "knows no attribute 'age'. It knows: look, ground"),
        ({'"steps" = 3': "", "batch = 4": "batch = 4\nprompts = ['a']"}, "draws without prompts: leave out prompts"),
        ({'site = "mid_block"': 'site = "middle"'}, "has no module middle. It has: conv_in"),
    ):
        text = study.read_text()
        for old, new in changed.items():
            text = text.replace(old, new)
        wrong = study.with_name("other.toml")
        wrong.write_text(text)
        command = "report" if "age" in text else "capture"
        folders = [tmp_path, tmp_path] if command == "report" else []
        Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
        assert main([command, str(wrong), *map(str, folders)]) == 1
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith(f"difflens {command}: ") and said in err
    with pytest.raises(SystemExit) as stopped:
        main(["captur", str(study)])
    assert stopped.value.code == 2


def test_what_is_not_installed_is_named():
    """`pip install .` takes no torch, and the commands need it and more."""
    begun = "from difflens_core.commands.__main__ import main"
    without = f"import sys; sys.modules['torch'] = None; {begun}; sys.exit(main(['x']))"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == 'difflens: torch is not installed. In the repository: pip install ".[commands]"\n'


def test_pictures_that_cannot_be_compared_are_named(tmp_path, capsys):
    study = study_of(tmp_path / "sizes", "avatars")
    for name, sizes in (("a", (16, 16)), ("b", (16,)), ("c", (16, 20))):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", (size, 16)).save(tmp_path / name / f"{number}.png")
    for folders, said in (
        ("ab", "a holds 2 pictures of 16 x 16, .*b holds 1 pictures of 16 x 16; they are compared by pairs"),
        ("ac", "c holds pictures of 16 x 16 and 20 x 16 .1.png.. Give pictures of one size"),
    ):
        assert main(["report", str(study), *(str(tmp_path / name) for name in folders)]) == 1
        assert re.search(said, capsys.readouterr().err)
