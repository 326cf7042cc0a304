"""Files: what is written comes back, and damaged or foreign files are refused in one clear sentence."""

from __future__ import annotations

import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import save_file

from difflens_core.classifiers import AttributeClassifier, load_classifier, save_classifier
from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.locate import save_probes
from difflens_core.locate.probes import load_probes
from difflens_core.networks import load_denoiser, save_denoiser
from difflens_core.sae import load_sae, save_sae
from difflens_core.steer import load_recipe, save_recipe

SAVERS = {
    "sae": lambda path, toys: save_sae(path, toys.sae()),
    "recipe": lambda path, toys: save_recipe(path, toys.recipe()),
    "probes": lambda path, toys: save_probes(path, toys.probes()),
    "classifier": lambda path, toys: save_classifier(path, AttributeClassifier({"age": ("a", "b")}, 32), {}),
    "denoiser": lambda path, toys: save_denoiser(path, toys.denoiser(), {}),
}
LOADERS = {
    "sae": load_sae,
    "recipe": load_recipe,
    "probes": load_probes,
    "classifier": load_classifier,
    "denoiser": load_denoiser,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


def test_tensors_and_info_come_back(path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([True, False]), "c": torch.tensor([3])}
    save_tensors(path, "sae", tensors, {"k": 3, "info": {"ä": [1, None]}})
    found, info = load_tensors(path, "sae")
    assert info == {"k": 3, "info": {"ä": [1, None]}} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 60, -200, -1])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_truncated_file_is_refused(toys, path, kind, kept):
    SAVERS[kind](path, toys)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DiffLensError, match="file.safetensors: .*cut off"):
        LOADERS[kind](path)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_of_another_kind_is_refused(toys, path, kind):
    for other in LOADERS.keys() - {kind}:
        SAVERS[other](path, toys)
        with pytest.raises(DiffLensError, match=f"a DiffLens {other} file, expected a DiffLens {kind} file"):
            LOADERS[kind](path)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_with_nan_or_infinity_are_refused(toys, path, kind, value):
    SAVERS[kind](path, toys)
    tensors, info = load_tensors(path, kind)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[-1] = value
    save_tensors(path, kind, tensors, info)
    with pytest.raises(DiffLensError, match=f"{name} holds NaN or infinite"):
        LOADERS[kind](path)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_that_lacks_a_part_is_refused(toys, path, kind):
    SAVERS[kind](path, toys)
    tensors, info = load_tensors(path, kind)
    part, field = list(tensors)[0], list(info)[0]
    for broken in (
        ({name: tensor for name, tensor in tensors.items() if name != part}, info),
        (tensors, {name: value for name, value in info.items() if name != field}),
    ):
        save_tensors(path, kind, *broken)
        with pytest.raises(DiffLensError, match="file.safetensors"):
            LOADERS[kind](path)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["DIFFLENS_TEST_PAYLOAD"],)


@pytest.mark.parametrize("write", [pickle.dumps, lambda x: x, lambda _: b"PK\x03\x04 not weights" * 9])
def test_what_is_not_safetensors_is_refused_and_never_run(path, tmp_path, monkeypatch, write):
    monkeypatch.setenv("DIFFLENS_TEST_PAYLOAD", str(tmp_path / "ran"))
    content = write(Payload())
    torch.save(content, path) if isinstance(content, Payload) else path.write_bytes(content)
    with pytest.raises(DiffLensError, match="not a readable safetensors file"):
        load_sae(path)
    assert not (tmp_path / "ran").exists()


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(DiffLensError, match=f"{path.name}: no such file. Expected a DiffLens recipe"):
            load_recipe(path)


@pytest.mark.parametrize("metadata", [None, {"difflens": "[1]"}, {"difflens": "{"}, {"difflens": "{}"}])
def test_foreign_safetensors_are_refused(path, metadata):
    save_file({"a": torch.ones(2)}, path, metadata)
    with pytest.raises(DiffLensError, match="file.safetensors"):
        load_sae(path)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save_tensors(path, "sae", {"a": torch.ones(2)}, {"k": 1})
    before = path.read_bytes()
    for tensors, info in (({"a": torch.ones(2)}, {"k": object()}), ({"a": "no tensor"}, {})):
        with pytest.raises((TypeError, AttributeError)):
            save_tensors(path, "sae", tensors, info)
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)  # the disk fails when all is written
    with pytest.raises(ZeroDivisionError):
        save_tensors(path, "sae", {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_saved_files_may_be_read_by_whom_the_umask_allows(path):
    save_tensors(path, "sae", {"a": torch.ones(2)}, {})
    path.with_name("plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.with_name("plain").stat().st_mode)
