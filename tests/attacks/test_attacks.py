"""Attempts on whoever opens a stranger's file, and what each gets: one sentence, and no code, memory or file of ours.

After the example of safetensors' own. Every file is made here; none lies in the repository.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from difflens_core.activations import SAMPLES, Index, open_store, record
from difflens_core.activations.store import write_shard
from difflens_core.classifiers import AttributeClassifier, load_any_classifier, save_classifier
from difflens_core.commands.pictures import read_picture
from difflens_core.commands.study import read_study
from difflens_core.explore import parse_choice
from difflens_core.files import LONGEST_MESSAGE, DiffLensError, load_tensors, read_content, save_tensors
from difflens_core.networks import load_checkpoint, load_denoiser, save_denoiser
from difflens_core.report import example_grid, example_of, with_provenance
from difflens_core.sae import load_any_sae, load_class_features
from difflens_core.steer import load_ml_act, load_recipe, save_recipe

ROOT = Path(__file__).resolve().parents[2]
MUCH = 2**27  # bytes that no attempt may take
Files = dict[str, bytes]


def refused(folder: Path, content: Files, load: Callable[[Path], object], name: str, said: str) -> None:
    """The files get one sentence that says `said`, in little memory."""
    for file, part in content.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(part)
    there = sorted(folder.rglob("*"))
    begun = peak(begin=True)
    with pytest.raises(DiffLensError, match=said) as caught:
        load(folder / name)
    assert peak() - begun < MUCH
    sentence = str(caught.value)
    assert sentence.isprintable() and len(sentence) <= 1.1 * LONGEST_MESSAGE
    assert sorted(folder.rglob("*")) == there


def peak(begin: bool = False) -> int:
    """The most memory in bytes since this was last told to begin, 0 where it cannot be told."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- pickles ---


class Call:
    """A call that a pickle makes when it is read."""

    def __init__(self, function: Any, *arguments: Any):
        self.made = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.made


def pickled(content: object, older: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not older)
    return file.getvalue()


WITH_CODE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an SAE": ("a.pt", load_any_sae, "a.pt"),
    "an SAE's folder": ("sae/a.pth", load_any_sae, "sae"),
    "a classifier": ("a.pt", load_any_classifier, "a.pt"),
    "a model": ("a.ckpt", load_checkpoint, "a.ckpt"),
    "feature files": ("named/female.pt", lambda folder: load_class_features(folder, 9), "named"),
    "a recipe": ("a.safetensors", load_recipe, "a.safetensors"),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("case", WITH_CODE)
def test_code_in_a_pickle_is_never_run(tmp_path, case, older):
    file, load, name = WITH_CODE[case]
    ran = tmp_path / "ran"
    content = {"encoder.weight": torch.ones(2), "more": Call(os.mkdir, str(ran))}
    refused(tmp_path, {file: pickled(content, older)}, load, name, "never loaded|not a readable safetensors file")
    assert not ran.exists()


MADE_FROM_NOTHING = {
    "a bytearray": (bytearray, 2**30),
    "a tensor": (torch.FloatTensor, 2**28),
    "a copy": (OrderedDict.fromkeys, range(9)),
    "a word turned to bytes": (str.encode, "a"),
}


@pytest.mark.parametrize("case", MADE_FROM_NOTHING)
def test_a_pickle_makes_nothing_that_is_not_in_its_file(tmp_path, case):
    refused(tmp_path, {"a.pt": pickled({"a": Call(*MADE_FROM_NOTHING[case])})}, read_content, "a.pt", "never loaded")


def in_itself() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["ema"] = content
    return content


REPEATED = {
    "one number many times": lambda: {"a": torch.ones(1).expand(2**15, 2**15)},
    "one tensor under many names": lambda: dict.fromkeys(map(str, range(999)), torch.ones(2**18)),
    "a sparse tensor": lambda: {"a": torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (2**20, 2**20))},
    "no number in a huge shape": lambda: {"a": torch.zeros(2**30, 0)},
}


@pytest.mark.parametrize("case", REPEATED)
def test_tensors_are_not_larger_than_their_file(tmp_path, case):
    refused(tmp_path, {"a.pt": pickled(REPEATED[case]())}, read_content, "a.pt", "far more memory than the file")


def test_a_file_that_lies_in_itself_is_refused(tmp_path):
    refused(tmp_path, {"a.pt": pickled(in_itself())}, load_checkpoint, "a.pt", "a.pt: its settings are damaged")


# --- zip archives ---


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: Files, how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


@pytest.mark.parametrize("part", ["data/0", "data.pkl"])
def test_a_zip_bomb_is_not_unpacked(tmp_path, part):
    parts = entries(pickled({"a": torch.ones(9)}))
    name = next(name for name in parts if name.endswith(part))
    bomb = zipped(parts | {name: bytes(MUCH + 2**26)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    refused(tmp_path, {"a.pt": bomb}, read_content, "a.pt", "a.pt: what is packed in it is larger than the file")


def test_storage_that_lies_about_its_size_is_refused(tmp_path):
    parts = entries(pickled({"a": torch.ones(9)}))
    name = next(name for name in parts if name.endswith("data.pkl"))
    nine, many = pickle.dumps(9, 2)[2:-1], pickle.dumps(10**8, 2)[2:-1]
    parts[name] = parts[name].replace(nine, many)
    refused(tmp_path, {"a.pt": zipped(parts)}, read_content, "a.pt", "a.pt: not a readable safetensors or PyTorch file")


@pytest.mark.parametrize("name", ["../outside", "/outside", "archive/../../outside", "C:\\outside", "NUL"])
def test_no_entry_of_an_archive_is_written_anywhere(tmp_path, name):
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    content = zipped({name: b"outside", **entries(pickled({"a": torch.ones(9)}))})
    (place / "a.pt").write_bytes(content)
    try:
        assert read_content(place / "a.pt").keys() == {"a"}
    except DiffLensError as error:
        assert str(error).startswith("a.pt: ")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.pt"] and not Path("/outside").exists()


def test_a_tar_with_a_link_out_of_its_folder_is_refused(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(tmp_path, {"a.pt": file.getvalue()}, read_content, "a.pt", "a.pt: not a readable safetensors or PyTorch")


# --- headers that lie ---


def header(told: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = json.dumps(told).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "longer than the file": header({}, length=2**40),
    "longer than a number": header({}, length=2**64 - 1),
    "longer than allowed": header({}, length=10**8 + 1),
    "numbers that overlap": header({"a": entry([16], 0, 64), "b": entry([8], 32, 64)}),
    "numbers that two own": header({"a": entry([16], 0, 64), "b": entry([16], 0, 64)}),
    "numbers beyond the end": header({"a": entry([32], 0, 128)}),
    "numbers before the begin": header({"a": entry([16], -64, 0)}),
    "an end before its begin": header({"a": entry([16], 64, 0)}),
    "a hole": header({"a": entry([8], 32, 64)}),
    "more numbers than there are": header({"a": entry([2**40], 0, 64)}),
    "a product beyond all numbers": header({"a": entry([2**32, 2**32], 0, 64)}),
    "fewer than none": header({"a": entry([-16], 0, 64)}),
    "no number in a huge shape": header({"a": entry([2**40, 0], 0, 0)}, b""),
    "an unknown type": header({"a": entry([16], 0, 64, "F31")}),
    "a pickle for a type": header({"a": entry([16], 0, 64, "cos\nsystem\n")}),
    "metadata that is no text": header({"__metadata__": {"difflens": {"kind": "sae"}}}),
    "nested without end": struct.pack("<Q", 4 * 10**5) + b'{"a":' + b"[" * (4 * 10**5 - 5),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, case):
    for load in (load_recipe, read_content):
        refused(tmp_path, {"a.safetensors": HEADERS[case]}, load, "a.safetensors", "^a.safetensors: ")


# --- settings that lie ---

DEEP = "[" * 10**5 + "]" * 10**5
LONG = json.dumps("a" * 2**23)  # more than settings ever are
SPARSIFY = {name: torch.ones(4, 2) for name in ("encoder.weight", "W_dec")} | {
    "encoder.bias": torch.ones(4), "b_dec": torch.ones(2)
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), [(DEEP, "not readable JSON"), (LONG, "larger than 8 MB"), ("[1]", "list")])
def test_json_that_is_deep_or_endless_is_refused_wherever_it_stands(tmp_path, text, said):
    tensors, told = save(SPARSIFY), text.encode()
    ours = save(SPARSIFY, {"difflens": text})
    for content, load, name in (
        ({"sae/a.safetensors": tensors, "sae/cfg.json": told}, load_any_sae, "sae"),
        ({"a.safetensors": ours}, load_recipe, "a.safetensors"),
        ({"b.safetensors": ours}, load_any_classifier, "b.safetensors"),
        ({"c.safetensors": tensors, "c.safetensors.json": told}, load_any_classifier, "c.safetensors"),
        ({"model/config.json": told}, load_checkpoint, "model"),
        ({"store/index.json": told}, open_store, "store"),
    ):
        refused(tmp_path, content, load, name, said)
    with pytest.raises(DiffLensError, match="choice is not what the explorer writes"):
        parse_choice(text)


@pytest.mark.parametrize("text", ["a = " + DEEP, "a = " + "9" * 5000, "\xff", "#" * 2**21])
def test_a_study_that_is_no_toml_is_refused(tmp_path, text):
    refused(tmp_path, {"study.toml": text.encode("latin-1")}, read_study, "study.toml", "study.toml is no TOML")
    large = f'model = "m"\nclassifier = "c"\nattribute = "a"\nsite = "s"\ncfg = {"9" * 400}'
    refused(tmp_path, {"study.toml": large.encode()}, read_study, "study.toml", "a number is too large")


def index(**told: Any) -> bytes:
    plain = {"version": 1, "sites": ["a"], "progress": [0.0], "pictures": 4, "per_shard": 2, "seed": 0, "model": ""}
    return json.dumps(plain | told).encode()


ENDLESS = {
    "pictures": (10**18, "1000000000000000000 of 1000000000000000000 shards are missing|shards are missing"),
    "per_shard": (0.5, "whole numbers"), "seed": ("0", "whole numbers"), "progress": ([2.0], "0 to 1"),
    "sites": ([["a"]], "damaged"), "model": (None, "texts"), "dtype": (["float16"], "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_an_index_that_promises_too_much_is_refused(tmp_path, name):
    value, said = ENDLESS[name]
    more = {"per_shard": 1} if name == "pictures" else {}
    refused(tmp_path, {"store/index.json": index(**{name: value} | more)}, open_store, "store", said)


@pytest.mark.parametrize(
    ("name", "value"),
    [("middle_depth", 10**9), ("decoder_depth", 1e300), ("heads", 3), ("heads", 0), ("size", "64"), ("width", -8)],
)
def test_a_denoiser_of_endless_depth_is_refused(toys, tmp_path, name, value):
    save_denoiser(tmp_path / "a.safetensors", toys.denoiser(), {})
    tensors, info = load_tensors(tmp_path / "a.safetensors", "denoiser")
    save_tensors(tmp_path / "a.safetensors", "denoiser", tensors, info | {"config": info["config"] | {name: value}})
    refused(tmp_path, {}, load_denoiser, "a.safetensors", "^a.safetensors: it.*damaged")


def test_names_that_promise_endless_networks_are_refused(tmp_path):
    none = torch.zeros(0)
    few = ("conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight", "fc.bias")
    blocks = {f"layer1.{n}.a": none for n in range(600)} | {name: torch.ones(1) for name in few}
    refused(tmp_path, {"a.safetensors": save(blocks)}, load_any_classifier, "a.safetensors", "more than any ResNet")
    names = ("output_blocks.0.0.in_layers.0.weight", f"output_blocks.{10**12}.0.a")
    adm = {name: torch.ones(1) for name in names}
    refused(tmp_path, {"b.safetensors": save(adm)}, load_checkpoint, "b.safetensors", "not a complete ADM")


def test_configurations_of_endless_networks_and_schedules_are_refused(toys, tmp_path):
    toys.unet2d().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for told in ({"layers_per_block": 10**9}, {"block_out_channels": [32] * 10**5}, {"norm_num_groups": 0}):
        content = {"model/config.json": json.dumps(config | told).encode()}
        refused(tmp_path, content, load_checkpoint, "model", "diffusers cannot build")
    schedule = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    for steps in (10**12, 1e3, None, 0):
        told = json.dumps(schedule | {"num_train_timesteps": steps}).encode()
        content = {"model/config.json": json.dumps(config).encode(), "model/scheduler_config.json": told}
        refused(tmp_path, content, load_checkpoint, "model", "expected 1 to 100000")


@pytest.mark.parametrize("shape", [(2, 3000, 1, 1), (2, 3, 0, 10**5), (10**5, 3, 0, 0)])
def test_levels_of_an_old_recipe_cannot_grow_without_end(toys, tmp_path, shape):
    save_recipe(tmp_path / "a.safetensors", toys.recipe())
    tensors, info = load_tensors(tmp_path / "a.safetensors", "recipe")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("levels.")}
    save_tensors(tmp_path / "a.safetensors", "recipe", tensors | {"levels": torch.zeros(shape)}, info)
    refused(tmp_path, {}, load_recipe, "a.safetensors", "too large for a file of that age|far more memory")


def test_numbers_that_only_float64_holds_are_refused(tmp_path):
    tensors = SPARSIFY | {"W_dec": torch.full((4, 2), 1e300, dtype=torch.float64)}
    content = {"sae/a.safetensors": save(tensors), "sae/cfg.json": b'{"expansion_factor": 2, "k": 1, "d_in": 2}'}
    refused(tmp_path, content, load_any_sae, "sae", "W_dec holds NaN or infinite")


# --- names ---

NAMES = {
    "very long": "a" * 10**5, "a line of its own": "a\nWARNING: all is well",
    "for the terminal": "\x1b[2J\x1b]0;mine\x07", "written backwards": "\u202etxt.exe",
    "half a letter": "\ud800", "a page's": "<script>alert(1)</script>",
    "of all the world": "наме 名前 🙂",
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names_in_a_file_do_not_break_the_sentence_about_it(tmp_path, case):
    name = NAMES[case]
    content = {"a.pt": pickled({name: torch.tensor([torch.nan]), "encoder.weight": torch.ones(1)})}
    for load in (load_any_sae, load_any_classifier, load_checkpoint):
        refused(tmp_path, content, load, "a.pt", "^a.pt: ")
    with pytest.raises(DiffLensError) as caught:
        parse_choice(json.dumps({"features": {"1": {name: 1}}}))
    assert str(caught.value).isprintable()


def test_names_that_the_explorer_would_show_are_texts(toys, tmp_path):
    save_recipe(tmp_path / "a.safetensors", toys.recipe())
    tensors, info = load_tensors(tmp_path / "a.safetensors", "recipe")
    for told in ({"named": {"0": {"id": 7}}}, {"named": {"0": {"name": ["x"]}}}, {"scores": [1.0]}, {"named": "x"}):
        save_tensors(tmp_path / "a.safetensors", "recipe", tensors, info | {"info": told})
        refused(tmp_path, {}, load_recipe, "a.safetensors", "^a.safetensors: its")


def test_names_that_are_no_texts_are_refused(tmp_path):
    """Found by fuzzing: what joins them into a sentence would fail later, or nobody would find the site."""
    tensors = {"W_enc": torch.ones(2, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 2), "b_dec": torch.ones(2)}
    config = {"architecture": "standard", "metadata": {"hook_name": 7}}
    content = {"sae/a.safetensors": save(tensors), "sae/cfg.json": json.dumps(config).encode()}
    refused(tmp_path, content, load_any_sae, "sae", "its site is 7")
    save_classifier(tmp_path / "a.safetensors", AttributeClassifier({"age": ("a", "b")}, 32), {})
    tensors, info = load_tensors(tmp_path / "a.safetensors", "classifier")
    for classes in (["a", 7], ["a", "a"], ["a"], "ab"):
        save_tensors(tmp_path / "a.safetensors", "classifier", tensors, info | {"attributes": {"age": classes}})
        refused(tmp_path, {}, load_any_classifier, "a.safetensors", "two different classes or more each")


@pytest.mark.parametrize("wrong", [torch.zeros(1, 2, 3, 2, 3), torch.zeros(1, 2, 2, 2, 0), torch.zeros(1, 2, 2, 2, 4)])
def test_shards_that_do_not_belong_together_are_refused(tmp_path, wrong):
    place = Index(("a",), (0.0,), pictures=4, per_shard=2, seed=0, model="")
    good = {"a": torch.zeros(1, 2, 2, 2, 3).half(), SAMPLES: torch.zeros(2, 3)}
    record(place, [torch.zeros(2)] * 2, lambda first, noise: good, tmp_path / "store")
    assert open_store(tmp_path / "store").samples().shape == (4, 3)
    write_shard(tmp_path / "store", place, 1, good | {"a": wrong.half()})
    refused(tmp_path, {}, open_store, "store", "store: the shards differ in the shape or type of a")


def test_the_page_takes_no_text_for_html():
    """What the page shows of names it sets as text. That this is so in a browser: tests/host/page/test_explorer.py."""
    risky = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|createContextualFragment|DOMParser"
        r"|\beval\(|new Function|javascript:|setHTML"
    )
    sources = sorted((ROOT / "web").rglob("*.js"))
    assert len(sources) > 8 and risky.search("a.innerHTML = b")
    assert not [path.name for path in sources if risky.search(path.read_text(encoding="utf-8"))]


# --- links and pictures ---


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few people make links")
def test_saving_over_a_link_leaves_what_it_points_to(toys, tmp_path):
    target = tmp_path / "of somebody else.safetensors"
    target.write_bytes(b"theirs")
    (tmp_path / "a.safetensors").symlink_to(target)
    save_recipe(tmp_path / "a.safetensors", toys.recipe())
    assert target.read_bytes() == b"theirs" and not (tmp_path / "a.safetensors").is_symlink()
    load_recipe(tmp_path / "a.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few people make links")
def test_a_link_that_leads_to_itself_or_nowhere_is_refused(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "gone")
    for name in ("a.safetensors", "b.safetensors"):
        refused(tmp_path, {}, load_recipe, name, f"{name}: no such file")
        refused(tmp_path, {}, read_content, name, f"{name}: not a readable")


def png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, told: bytes) -> bytes:
        return struct.pack(">I", len(told)) + kind + told + struct.pack(">I", zlib.crc32(kind + told))

    packed = zlib.compress(bytes(width // 8 + 1) * min(height, 999))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


PICTURES = {
    "a bomb": (png(9000, 9000), "9000 x 9000 pixels"),
    "a bomb as WebP": (b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\xdf\x2e\0\xdf\x2e\0", "12000 x 12000 pixels"),
    "a program for a printer": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify"),
    "text": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "cannot identify"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_that_is_none_is_refused(tmp_path, case):
    content, said = PICTURES[case]
    refused(tmp_path, {"a.png": content}, read_picture, "a.png", f"a.png cannot be read as a picture .*{said}")


def test_a_picture_in_a_recipe_costs_what_its_file_does(toys):
    """PIL's own refusal of so many pixels is no ValueError."""
    content = bytearray(example_grid(torch.rand(1, 8, 8, 3)))
    at = content.index(b"\xff\xc0")  # the frame's head, with height and width
    content[at + 5 : at + 9] = b"\xff" * 4
    recipe = with_provenance(toys.recipe(), example=bytes(content))
    with pytest.raises(DiffLensError, match="The recipe's example cannot be shown"):
        example_of(recipe)


def test_what_ml_act_has_learnt_costs_what_its_file_does(tmp_path):
    """A recipe holds a map as a matrix: of some 100 KB one of 10 GB could be made."""
    state = {"net.w1": torch.ones(50_000), "net.b1": torch.ones(50_000), "quantiles_src": [-1e6, 1e6]}
    file = "learnt/unet.transformer_blocks.0.statedict"
    refused(tmp_path, {file: pickled(state)}, lambda path: load_ml_act(path, "age", "old"), "learnt", "maps 50000 chan")


def test_what_is_refused_is_refused_for_a_reason(tmp_path):
    """The same ways, with nothing hostile in them, are open."""
    save_file(SPARSIFY, tmp_path / "a.safetensors")
    (tmp_path / "cfg.json").write_text('{"expansion_factor": 2, "k": 1, "d_in": 2}')
    assert load_any_sae(tmp_path)[0].latents == 4
    (tmp_path / "b.pt").write_bytes(pickled({"ema": {"a": torch.ones(2**18), "b": torch.nn.Parameter(torch.ones(2))}}))
    assert isinstance(read_content(tmp_path / "b.pt")["ema"]["a"], Tensor)
    marked = torch.ones(2)
    marked.mark = "of its own"
    state = {"milestones": Counter([3, 5]), "skipped": {7}, "eps": 1j, "a": marked, "small": marked.to(torch.uint16)}
    for older in (False, True):
        (tmp_path / "c.pt").write_bytes(pickled(state if not older else state | {"small": marked}, older))
        assert read_content(tmp_path / "c.pt")["milestones"] == Counter([3, 5])
    (tmp_path / "a.png").write_bytes(png(64, 64))
    assert read_picture(tmp_path / "a.png").shape == (64, 64, 3)
