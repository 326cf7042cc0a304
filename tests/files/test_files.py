"""Files: what is written comes back, and damaged or foreign files are refused in one clear sentence."""

from __future__ import annotations

import errno
import os
import pickle
import random
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from difflens_core.classifiers import AttributeClassifier, load_classifier, save_classifier
from difflens_core.files import (
    DiffLensError,
    NotWritten,
    fingerprint,
    load_tensors,
    made_by,
    read_content,
    read_tensors,
    same_weights,
    save_tensors,
    sums_mark,
)
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


# --- files as people have them ---


def test_what_is_loaded_does_not_change_when_its_file_is_written_over(path):
    save_tensors(path, "sae", {"a": torch.ones(4096)}, {})
    found = load_tensors(path, "sae")[0], read_content(path), read_tensors(path)
    with path.open("r+b") as file:  # in place: a tensor mapped from the file would show it, or end the process
        file.truncate(100)
    assert all(torch.equal(tensors["a"], torch.ones(4096)) for tensors in found)


def damaged(content: bytes, count: int):
    """The bytes with one part flipped, cut out, or put in, `count` times."""
    draw = random.Random(0)
    for _ in range(count):
        at, n = draw.randrange(len(content)), draw.choice((1, 1, 2, 8, 64))
        noise = draw.randbytes(n)
        middle, rest = draw.choice(((noise, at + n), (b"", at + n), (noise, at)))
        yield content[:at] + middle + content[rest:]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pytorch_file_is_read_or_refused_in_one_sentence(path, zipped):
    weights = {"encoder.weight": torch.randn(3, 4), "b": torch.arange(5), "c": {"d": [torch.ones(2)], "e": 1.5}}
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    refused = 0
    for content in damaged(path.read_bytes(), 600):
        path.write_bytes(content)
        try:
            assert all(isinstance(name, str) for name in read_tensors(path))
        except DiffLensError as error:
            refused += 1
            assert str(error).startswith("file.safetensors: ") and "\n" not in str(error)
    assert 50 < refused < 600


@pytest.mark.parametrize("kind", LOADERS)
def test_a_damaged_file_of_ours_is_read_or_refused_in_one_sentence(toys, path, kind):
    SAVERS[kind](path, toys)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for content in damaged(whole[:header], 150):
        path.write_bytes(content + whole[header:])
        try:
            LOADERS[kind](path)
        except DiffLensError as error:
            refused += 1
            assert str(error).startswith("file.safetensors: ") and "\n" not in str(error)
    assert refused > 20


KINDS = {
    "a JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(99),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "a GGUF file": b"GGUF\x03\x00\x00\x00" + bytes(99),
    "a web page": b"<!DOCTYPE html><html><title>404</title></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a text file": "Grüße, dies ist kein Rezept.\n".encode() * 40,
}


@pytest.mark.parametrize("kind", [*KINDS, "a zip archive", "a PyTorch file"])
def test_a_file_is_called_what_it_is(path, kind):
    if kind == "a zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("read me.txt", "hello")
    elif kind == "a PyTorch file":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(KINDS[kind])
    with pytest.raises(DiffLensError, match=f"file.safetensors: not a readable safetensors file, but {kind}") as error:
        load_recipe(path)
    assert "cut off" not in str(error.value)
    if kind != "a PyTorch file":
        with pytest.raises(DiffLensError, match=f"not a readable safetensors or PyTorch file, but {kind}"):
            read_content(path)


FAILURES = {errno.ENOSPC: "Make room on the disk", errno.EROFS: "can be written to", errno.EACCES: "can be written to"}


@pytest.mark.parametrize("code", FAILURES)
def test_what_cannot_be_written_is_said_in_words(path, monkeypatch, code):
    def fail(*_, **__) -> None:
        raise OSError(code, os.strerror(code))

    for place in ((Path, "write_bytes"), (os, "replace"), (Path, "mkdir")):
        words = f"file.safetensors could not be written: {os.strerror(code)}. .*{FAILURES[code]}"
        with monkeypatch.context() as patch, pytest.raises(NotWritten, match=words):
            patch.setattr(*place, fail)
            save_tensors(path, "recipe", {"a": torch.ones(2)}, {})
    assert not list(path.parent.iterdir())


def test_a_name_that_cannot_be_is_said_in_words(path):
    path.write_bytes(b"")
    for place in (path / "inside.safetensors", path.parent, path.with_name("é" * 200)):
        with pytest.raises(NotWritten, match="could not be written: .* Choose a(nother| shorter) name"):
            save_tensors(place, "recipe", {"a": torch.ones(2)}, {})


def test_a_file_that_holds_the_same_already_keeps_its_time(path):
    save_tensors(path, "recipe", {"a": torch.ones(2)}, {})
    os.utime(path, ns=(10**18, 10**18))
    save_tensors(path, "recipe", {"a": torch.ones(2)}, {})
    assert path.stat().st_mtime_ns == 10**18
    save_tensors(path, "recipe", {"a": torch.zeros(2)}, {})
    assert path.stat().st_mtime_ns > 10**18


@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_numbers_beyond_fp16_are_saved_so_that_they_can_be_read(toys, path, scale):
    recipe = replace(toys.recipe(), probe_weight=toys.recipe().probe_weight * scale)
    save_recipe(path, recipe)
    half_a_unit = float(recipe.probe_weight.abs().max()) / 253
    torch.testing.assert_close(load_recipe(path).probe_weight, recipe.probe_weight, atol=half_a_unit, rtol=0)
    classifier = AttributeClassifier({"age": ("a", "b")}, 32)
    classifier.features[1].running_var.fill_(scale)
    save_classifier(path, classifier, {})
    assert torch.equal(load_classifier(path).features[1].running_var, classifier.features[1].running_var)
    model = toys.denoiser()
    model.position.data.mul_(scale)
    save_denoiser(path, model, {})
    assert torch.equal(load_denoiser(path).position, model.position)
    sae = replace(toys.sae(), encoder=toys.sae().encoder * scale)
    save_sae(path, sae, torch.float16)
    assert torch.equal(load_sae(path).encoder, sae.encoder)


@pytest.mark.parametrize("kind", ["sae", "recipe", "classifier", "denoiser"])
def test_our_own_files_in_fp8_load_and_whole_numbers_are_refused(toys, path, kind):
    SAVERS[kind](path, toys)
    tensors, info = load_tensors(path, kind)
    matrices = [name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()]
    save_tensors(path, kind, tensors | {name: tensors[name].to(torch.float8_e4m3fn) for name in matrices}, info)
    LOADERS[kind](path)
    save_tensors(path, kind, tensors | {matrices[0]: tensors[matrices[0]].to(torch.int8)}, info)
    with pytest.raises(DiffLensError, match=f"file.safetensors: tensor {matrices[0]} holds whole numbers .int8."):
        LOADERS[kind](path)


# --- marks ---


PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def test_weights_have_one_mark_in_every_precision(toys):
    weights = toys.denoiser().state_dict()
    marks = [fingerprint({name: w.to(dtype) for name, w in weights.items()}) for dtype in PRECISIONS]
    assert len(set(marks[:3])) == 1 and all(same_weights(marks[0], mark) for mark in marks)
    largest = max(weights, key=lambda name: weights[name].numel())
    grown = weights | {largest: weights[largest] * 1.1}
    others = [toys.denoiser(7).state_dict(), grown, {f"a.{name}": w for name, w in weights.items()}, {}]
    assert not any(same_weights(marks[0], fingerprint(other)) for other in others)
    assert made_by(sums_mark(weights), weights) and not made_by(sums_mark(weights), grown)
    assert not made_by("my-model", weights) and same_weights("my-model", "my-model")
    assert not same_weights("my-model", "my-other")


def test_a_damaged_file_is_not_called_a_pickle_by_the_length_of_its_header(tmp_path):
    """2432, little-endian, begins as a pickle does."""
    path = tmp_path / "cut_off.safetensors"
    path.write_bytes((2432).to_bytes(8, "little") + b'{"name": ' + b" " * 500)
    with pytest.raises(DiffLensError, match="cut_off.safetensors: not a readable safetensors file .*cut off"):
        load_recipe(path)


def test_tensors_have_one_order_each_time_they_are_read(tmp_path):
    """Messages name the first ones; safetensors itself orders them by chance."""
    names = [f"{letter}.weight" for letter in "abcdefghij"]
    save_tensors(tmp_path / "a.safetensors", "sae", {name: torch.ones(2) for name in names}, {})
    assert list(load_tensors(tmp_path / "a.safetensors", "sae")[0]) == names
    assert list(read_tensors(tmp_path / "a.safetensors")) == names
