"""Every kind of file that the pack reads: how a good one is written, in few bytes, and by what it is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "sae")]


def toy_maker() -> Any:
    """The module of the tests' small random models, which cannot be imported by its name here."""
    spec = importlib.util.spec_from_file_location("toys", ROOT / "tests" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toys = toy_maker()

from foreign import CASES, SPARSIFY, C, N, make, told_the_time  # noqa: E402

from difflens_core import (  # noqa: E402
    activations,
    classifiers,
    explore,
    files,
    locate,
    measure,
    networks,
    report,
    sae,
    steer,
)
from difflens_core.activations.store import load_labels  # noqa: E402
from difflens_core.classifiers.faces import load_face_finder  # noqa: E402
from difflens_core.commands.fairness import read_asked  # noqa: E402
from difflens_core.commands.pictures import LARGEST, read_picture  # noqa: E402
from difflens_core.commands.study import read_study  # noqa: E402
from difflens_core.experiments.draw import Trials  # noqa: E402
from difflens_core.locate.probes import load_probes  # noqa: E402
from difflens_core.sae.training import State, initial_sae  # noqa: E402
from difflens_core.steer.weighing import read_weights  # noqa: E402

FILE = "file.safetensors"


@dataclass(frozen=True)
class Format:
    """write(folder): the files of a good one; load(folder): what we make of them.

    spare: bytes of memory that may be taken whatever the files' size.
    """

    write: Callable[[Path], object]
    load: Callable[[Path], object]
    spare: int = 64 * 2**20


def of(loader: Callable[[Path], object], name: str = FILE) -> Callable[[Path], object]:
    return lambda folder: loader(folder / name)


# --- our own ---


def rich_recipe() -> steer.Recipe:
    """A recipe with all that one can have: traits, a frame, changes, weights, a map."""
    recipe = replace(toys.recipe(), levels=toys.levels(), map=(2, 2), weight=torch.ones(5))
    frame = locate.FrameProbes(torch.randn(3, 4, 6), torch.randn(3, 4))
    draw = toys.random(8)
    layers = draw(7, 3, 3, 6), draw(7), draw(7, 3, 3, 7), draw(7), draw(3, 8, 7), draw(3, 8)
    changes = locate.Changes(draw(6, 6), draw(6), *layers, draw(3, 2), draw(4).abs(), draw(4, 5))
    recipe = replace(recipe, frame=frame, changes=changes, mode="twin", hold=True)
    return replace(recipe, info={"scores": [1.0] * 5, "named": {"0": {"name": "beard", "group": "hair"}}})


def old_recipe(folder: Path) -> None:
    """As version 0.4 wrote it, with levels for each step, class and position."""
    steer.save_recipe(folder / FILE, toys.recipe())
    tensors, info = files.load_tensors(folder / FILE, "recipe")
    tensors = files.out_of_bytes(tensors)
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("levels.")}
    info = {name: told for name, told in info.items() if name not in ("map", "hold", "traits", "further")}
    files.save_tensors(folder / FILE, "recipe", plain | {"levels": toys.recipe().levels.dense()}, info)


def two_sites() -> steer.Recipe:
    return steer.joined(toys.recipe(), replace(toys.recipe(seed=6), site="late"))


def classifier(folder: Path) -> None:
    classifiers.save_classifier(folder / FILE, classifiers.AttributeClassifier({"age": ("a", "b")}, 32), {})


def framed_classifier(folder: Path) -> None:
    model = classifiers.FramedClassifier({"age": ("a", "b")}, {"light": ("day", "night")})
    classifiers.save_classifier(folder / FILE, model, {})


def prompted(folder: Path) -> None:
    text = networks.TextEncoder(("a", "man", "woman"), width=8, length=4, depth=1)
    networks.save_denoiser(folder / FILE, toys.denoiser(context_width=8), {}, text)


INDEX = activations.Index(("middle",), (0.0, 0.5), pictures=4, per_shard=2, seed=1, model="abc", info={"steps": 2})


def store(folder: Path) -> None:
    def shard(first: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        values = torch.randn(2, len(noise), 2, 2, 3, generator=torch.Generator().manual_seed(first)).half()
        return {"middle": values, activations.SAMPLES: noise}

    noises = [torch.zeros(2, 3, 4, 4)] * 2
    activations.record(INDEX, noises, shard, folder)
    activations.save_labels(folder, {"age": (("a", "b"), torch.tensor([0, 1, 1, 0]))})


def open_store(folder: Path) -> object:
    found = activations.open_store(folder)
    return found.activations(), found.samples(), load_labels(folder)


def calibration(folder: Path) -> None:
    trials(folder).save([(0, 1, 0.5), (1, 2, 0.5)], np.full((2, 3), 1 / 3))


def trials(folder: Path) -> Trials:
    return Trials(toys.recipe(), None, None, 2, lambda done: None, folder)


def weights(folder: Path) -> None:
    files.save_tensors(
        folder / FILE, "weights", {"weight": torch.ones(5)}, {"weighed": {"why": "", "spared": ["hair"]}}
    )


def training() -> State:
    seen, options = toys.activations(), sae.TrainingOptions(latents=20, k=4, batch=8, steps=9)
    return State(initial_sae(seen, options), options, seen, "cpu")


def judgements(folder: Path) -> None:
    for number, better in enumerate((measure.FIRST, measure.SECOND, measure.NEITHER), 1):
        one = measure.Judgement(
            "2026-01-01T00:00:00+00:00", "Ada", f"p{number}", number, False, "before", "after", measure.FIRST, better,
            ("hair", "person"),
        )  # fmt: skip
        measure.add_judgement(folder / "file.csv", one)


STUDY = """model = "m"
classifier = "c.safetensors"
attribute = "age"
site = "mid_block"
prompts = ["a man", "a woman"]
size = [64, 96]
cfg = 3.0
spare_others = true

[train]
latents = 99
lr = 1e-3

[capture]
pictures = 3
"""
CHOICE = {"features": {"17": {"on": False, "weight": 0.5, "name": "beard", "group": "hair"}, "3": {"on": True}}}


def picture(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "file.png")


def photograph(ending: str, folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"file.{ending}")


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


# --- of other programs ---


def foreign(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], way: str, folder: Path, name: str = "sae"
) -> None:
    """An SAE of another program as safetensors, zipped by torch, or as torch wrote it before."""
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if way == "safetensors":
        save_file(tensors, folder / f"{name}.safetensors")
    else:
        torch.save({"state_dict": tensors}, folder / f"{name}.pt", _use_new_zipfile_serialization=way == "zipped")
    if config:
        (folder / ("config.json" if "trainer" in config else "cfg.json")).write_text(json.dumps(config))


def reference(kernel: int) -> dict[str, torch.Tensor]:
    draw = toys.random(9)
    decoder = draw(N, C, kernel, kernel) if kernel > 1 else draw(C, N, 1, 1)
    return {
        "encoder.weight": draw(N, C, kernel, kernel), "encoder.bias": draw(N), "decoder.weight": decoder,
        "decoder.bias": draw(C),
    }  # fmt: skip


def features(folder: Path) -> None:
    torch.save(torch.arange(20), folder / "female.pt")
    torch.save(torch.arange(7, 30), folder / "male.pt")


def ml_act(method: str, module: str, folder: Path) -> None:
    """What ml-act wrote of a module; where it is a map of each channel, the folder's name has to say so, too."""
    names = ("mu1", "mu2", "std1", "std2") if method == "gaussian" else ("net.w1", "net.b1")
    state = {name: 0.5 + torch.rand(C) for name in names}
    torch.save(state | {"quantiles_src": [-1e6, 1e6]}, folder / f"unet.{module}.statedict")


def load_ml_act(folder: Path) -> steer.Recipe:
    return steer.load_ml_act(folder, "age", "old")


def example(folder: Path) -> None:
    (folder / "example").write_bytes(report.example_grid(torch.rand(2, 16, 16, 3)))


def load_example(path: Path) -> object:
    return report.example_of(report.with_provenance(toys.recipe(), example=path.read_bytes()))


def resnet(folder: Path) -> None:
    """Of one block a level, in fp8: the smallest of torchvision's layout."""
    from torchvision.models.resnet import BasicBlock, ResNet

    weights = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2).state_dict()
    small = {n: w.to(torch.float8_e4m3fn) if w.is_floating_point() else w for n, w in weights.items()}
    save_file(small, folder / FILE)
    (folder / f"{FILE}.json").write_text(json.dumps({"attributes": {"age": ["a", "b"]}, "size": 64}))


def detector(folder: Path) -> None:
    from kornia.contrib.face_detection import YuNet

    torch.save(YuNet("test", pretrained=False).state_dict(), folder / "yunet.pth")


ADM = networks.AdmConfig(
    model_channels=32, channels=(32, 32), res_blocks=1, attention=(1,), head_channels=0, heads=2, resblock_updown=False
)


def adm(folder: Path) -> None:
    torch.save({"ema": {n: w.half() for n, w in toys.adm(ADM).state_dict().items()}}, folder / "model.pt")


def unet2d(folder: Path) -> None:
    toys.unet2d().half().save_pretrained(folder)
    told = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": True}
    (folder / "scheduler_config.json").write_text(json.dumps(told | {"beta_start": 1e-4, "beta_end": 0.02}))


WAYS = ("safetensors", "zipped", "older")
SHIPPED = ROOT / "models" / "avatars" / "difflens_recipes" / "avatars_age.safetensors"

PIXELS = 16 * LARGEST  # a picture of one colour is small in its file: what the largest takes while it is read

FORMATS: dict[str, Format] = {
    "recipe": Format(lambda folder: steer.save_recipe(folder / FILE, rich_recipe()), of(steer.load_recipe)),
    "recipe of two sites": Format(lambda folder: steer.save_recipe(folder / FILE, two_sites()), of(steer.load_recipe)),
    "recipe of 0.4": Format(old_recipe, of(steer.load_recipe)),
    "recipe, shipped": Format(lambda folder: shutil.copy(SHIPPED, folder / FILE), of(steer.load_recipe)),
    "SAE": Format(lambda folder: sae.save_sae(folder / FILE, toys.sae()), of(sae.load_any_sae)),
    "probes": Format(lambda folder: locate.save_probes(folder / FILE, toys.probes()), of(load_probes)),
    "classifier": Format(classifier, of(classifiers.load_any_classifier)),
    "classifier with frames": Format(framed_classifier, of(classifiers.load_any_classifier)),
    "denoiser": Format(
        lambda folder: networks.save_denoiser(folder / FILE, toys.denoiser(), {}), of(networks.load_denoiser)
    ),
    "denoiser by prompt": Format(prompted, of(networks.load_prompted)),
    "activation store": Format(store, open_store),
    "calibration readings": Format(calibration, trials),
    "weights of latents": Format(weights, of(lambda path: read_weights(path, toys.recipe()))),
    "training state": Format(
        lambda folder: training().save(folder / "state.pt"), of(lambda path: training().load(path), "state.pt")
    ),
    "judgements": Format(judgements, of(measure.read_judgements, "file.csv")),
    "study": Format(text("study.toml", STUDY), of(read_study, "study.toml")),
    "choice of features": Format(
        text("choice.json", json.dumps(CHOICE)),
        of(lambda path: explore.parse_choice(path.read_bytes().decode(errors="replace")), "choice.json"),
    ),
    "classes asked for": Format(
        text("asked.json", '{"attribute": "age", "asked": [0, 1, 2]}'), of(read_asked, "asked.json")
    ),
    "picture, PNG": Format(picture, of(read_picture, "file.png"), PIXELS),
    "picture, JPEG": Format(partial(photograph, "jpg"), of(read_picture, "file.jpg"), PIXELS),
    "picture, WebP": Format(partial(photograph, "webp"), of(read_picture, "file.webp"), PIXELS),
    "picture in a recipe": Format(example, of(load_example, "example")),
    "ml-act's map": Format(partial(ml_act, "gaussian", "mid_block"), load_ml_act),
    "ml-act's map of tokens": Format(partial(ml_act, "linear", "transformer_blocks.0.norm1"), load_ml_act),
    "feature files": Format(features, lambda folder: sae.load_class_features(folder, 20)),
    "ResNet": Format(resnet, of(classifiers.load_any_classifier)),
    "face detector": Format(detector, of(load_face_finder, "yunet.pth")),
    "ADM": Format(adm, of(networks.load_checkpoint, "model.pt")),
    "UNet2D": Format(unet2d, networks.load_checkpoint),
}
for _case in CASES:
    for _way in WAYS:
        _tensors, _config, _ = make(toys, _case)
        FORMATS[f"{_case}, {_way}"] = Format(partial(foreign, _tensors, _config, _way), sae.load_any_sae)
for _kernel in (1, 3):
    FORMATS[f"reference {_kernel} x {_kernel}"] = Format(
        partial(foreign, reference(_kernel), SPARSIFY | {"num_latents": 0}, "zipped"), sae.load_any_sae
    )
FORMATS["DifFRACT"] = Format(
    partial(foreign, told_the_time(toys), {}, "zipped", name="sae_img_6"), of(sae.load_any_sae, "sae_img_6.pt")
)


def good_files(name: str, folder: Path) -> dict[str, bytes]:
    """The content of a good one's files, by their names."""
    torch.manual_seed(0)
    FORMATS[name].write(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
