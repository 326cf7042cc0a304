"""Files by their names: spelled alike on every system, noticed when they change, never a device of Windows."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from expected import shipped
from graphs import to_api
from safetensors.torch import save_file
from small_graphs import AVATARS, Avatars, foreign_sae, text_of

from difflens_core.steer import load_recipe, save_recipe

OWN = AVATARS / "difflens_recipes" / "avatars_age.safetensors"


@pytest.fixture
def folder(inside, tmp_path, monkeypatch):
    """The recipes' only folder, with one in a sub-folder."""
    import folder_paths

    kind = inside.host.RECIPES
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "sub").mkdir()
    shutil.copy(OWN, tmp_path / "sub" / "age.safetensors")
    return tmp_path


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_are_listed_and_found_alike_on_every_system(inside, folder, monkeypatch, separator):
    import folder_paths

    host, listed = inside.host, f"sub{separator}age.safetensors"
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: [listed])
    assert host.list_files(host.RECIPES) == ["sub/age.safetensors"]
    for given in ("sub/age.safetensors", "sub\\age.safetensors"):
        assert host.find_file(host.RECIPES, given) == str(folder / "sub" / "age.safetensors")
        assert host.check_name(host.RECIPES, given, host.list_files(host.RECIPES)) is True
        assert host.new_file(host.RECIPES, given) == (folder / "sub" / "age.safetensors", "sub/age.safetensors")
    assert host.check_name(host.RECIPES, None, []) is True
    told = host.check_name(host.RECIPES, "gone", host.list_files(host.RECIPES))
    assert f"'gone' is not on this machine: put it into {folder} or" in told and "There is: sub/age" in told


def test_letters_that_macos_takes_apart_are_the_same(inside, folder):
    host, apart, whole = inside.host, "sub/a\u0301ge\u0308.safetensors", "sub/\u00e1g\u00eb.safetensors"
    shutil.copy(OWN, folder / apart)
    assert whole in host.list_files(host.RECIPES) and apart not in host.list_files(host.RECIPES)
    for given in (apart, whole):
        assert host.check_name(host.RECIPES, given, host.list_files(host.RECIPES)) is True
        assert host.find_file(host.RECIPES, given) == str(folder / apart)
        assert host.new_file(host.RECIPES, given)[1] == whole


@pytest.mark.parametrize(
    "name",
    ["NUL", "con", "CON.safetensors", "com1", "Lpt9.old", "sub/aux/mine", "sub\\prn", "com¹", "mine.", "mine /a"],
)
def test_names_that_windows_keeps_are_refused(inside, folder, name):
    with pytest.raises(inside.DiffLensError, match="cannot be a file name"):
        inside.host.new_file(inside.host.RECIPES, name)
    assert inside.host.new_file(inside.host.RECIPES, "console.1/COM10")[1] == "console.1/COM10.safetensors"


def test_whatever_a_name_stands_for_is_noticed_when_it_changes(inside, folder):
    host, file = inside.host, folder / "sub" / "age.safetensors"
    node = inside.pack_module("nodes.load").LoadRecipe

    def states():
        return node.fingerprint_inputs("sub\\age.safetensors"), node.fingerprint_inputs(None)

    seen = [states()]
    assert states() == seen[0]
    file.write_bytes(file.read_bytes() + b" ")
    seen.append(states())
    (folder / "sub" / "age.safetensors.json").write_text("{}")
    seen.append((states()[0], "beside"))
    file.unlink()
    seen.append(states())
    assert all(len({*column}) == 4 for column in zip(*seen, strict=True))
    assert host.name_state(host.RECIPES, "gone") == "none"


def test_what_takes_long_to_make_is_made_again_only_if_it_is_gone(inside, tmp_path):
    times, made = inside.host.times_missed, tmp_path / "sae.safetensors"
    seen = [times(made)]
    made.write_text("trained")
    seen += [times(made), times(made)]
    made.write_text("trained anew")
    seen += [times(made)]
    made.unlink()
    seen += [times(made)]
    made.write_text("once more")
    assert [*seen, times(made)] == [0, 0, 0, 0, 1, 1]
    for module, node in (("train", "TrainSAE"), ("capture", "CaptureActivations")):
        node = getattr(inside.pack_module(f"nodes.{module}"), node)
        assert node.fingerprint_inputs(save_as="gone") != node.fingerprint_inputs(save_as="gone"), node
        assert node.fingerprint_inputs(save_as=" ") == node.fingerprint_inputs() == ""


# --- on a server ---


def copied(server, graph_of):
    """Text that Load SAE shows and the recipe that Save Recipe wrote, after one run."""
    graph, shown, name = graph_of()
    entry = server.run(to_api(graph))
    return text_of(entry, shown), server.base / "models" / "difflens_recipes" / f"{name}.safetensors"


def test_changed_files_are_read_again_and_deleted_ones_written_again(server):
    recipes = server.base / "models" / "difflens_recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    shutil.copy(OWN, recipes / "changing.safetensors")
    foreign_sae(server, "changing")

    def graph_of():
        graph = Avatars()
        graph.add("DiffLensSaveRecipe", recipe=graph.recipe("changing"), name="sub\\copied")
        loaded = graph.add("DiffLensLoadSAE", sae_name="changing", site="middle_block")
        return graph, graph.show(loaded[1]), "sub/copied"

    text, copy = copied(server, graph_of)
    assert "8 latents" in text and load_recipe(copy).attribute == "age"
    first = copy.stat().st_mtime_ns
    assert copied(server, graph_of)[0] == text and copy.stat().st_mtime_ns == first
    copy.unlink()
    copied(server, graph_of)
    assert load_recipe(copy).attribute == "age"

    save_recipe(recipes / "changing.safetensors", shipped("presentation"))
    shapes = {"encoder.weight": (6, 256), "encoder.bias": (6,), "W_dec": (6, 256), "b_dec": (256,)}
    folder = server.base / "models" / "difflens_saes" / "changing"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text('{"expansion_factor": 32, "k": 2, "d_in": 256, "signed": false}')
    text, copy = copied(server, graph_of)
    assert "6 latents" in text and load_recipe(copy).attribute == "presentation"


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no second time")
def test_a_file_of_another_content_is_noticed_also_if_its_time_and_size_are_the_same(inside, tmp_path):
    """As after a clock was set back, or from programs that unpack and copy files with their times."""
    path, states = tmp_path / "a.safetensors", []
    for content in (b"old", b"old", b"new"):
        if not states or content == b"new":
            path.write_bytes(content)
            os.utime(path, (0, 0))
        states.append(inside.host.on_disk(path))
        time.sleep(0.05)  # the system's clock of files is coarse
    assert states[0] == states[1] != states[2]


def test_a_graph_from_windows_runs_here(server):
    graph = Avatars()
    graph.add("DiffLensSaveRecipe", recipe=graph.recipe("controls\\presentation_random"), name="from_windows")
    server.run(to_api(graph))
    options = server.object_info()["DiffLensLoadRecipe"]["input"]["required"]["recipe_name"][1]["options"]
    assert options[-1] == "controls/presentation_random.safetensors" and "from_windows.safetensors" in options


def test_a_list_holds_only_what_its_node_can_load(inside):
    host = inside.host
    models, prompted = host.list_models(), host.list_prompted()
    assert "avatars.safetensors" in models and "prompted_avatars.safetensors" in prompted
    assert not {*models} & {*prompted} and {*models} | {*prompted} >= {*host.list_files(host.MODELS)}
    assert "avatars.safetensors" in host.list_files(host.CLASSIFIERS)
    assert "avatars.safetensors" not in host.list_detectors()
