"""Captures into a store: the pictures of a KSampler, gone on with after Cancel, loaded and trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graphs import Graph, Node, to_api
from host import HostError, Server
from small_graphs import AVATARS, Avatars, cancel_in, latents, text_of

from difflens_core.activations import capture, open_store
from difflens_core.files import fingerprint
from difflens_core.networks import DenoiserSampler, load_denoiser


def stored(server: Server, name: str) -> dict[str, bytes]:
    """The files of a store in the user's folder."""
    folder = server.base / "models" / "difflens_activations" / name
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_cancelled_capture_goes_on_to_the_store_of_an_uninterrupted_one(server):
    def graph(name: str, **settings: object) -> tuple[Graph, Node]:
        graph = Avatars(pictures=4)
        inputs = {"pictures": 62, "steps": 4, "seed": 8, "site": "middle_block, up", "save_as": name}
        captured = graph.capture(**{**inputs, **settings})
        graph.add("PreviewImage", images=captured[1])
        return graph, captured

    cancel_in(server, *graph("cut"))
    begun = stored(server, "cut")
    assert 0 < len(begun) < 17, "16 shards and the index"
    server.run(to_api(graph("cut")[0]))
    server.run(to_api(graph("whole")[0]))
    cut, whole = stored(server, "cut"), stored(server, "whole")
    assert cut == whole and len(whole) == 17 and all(cut[name] == content for name, content in begun.items())
    with pytest.raises(HostError, match="Capture Activations: cut was begun with other settings: seed 8, now 9"):
        server.run(to_api(graph("cut", seed=9)[0]))


def test_a_store_holds_the_pictures_of_a_ksampler_and_is_loaded_again(server):
    graph = Avatars(pictures=3)
    captured = graph.capture(pictures=3, steps=4, seed=3, save_as="sub/some", start_percent=0.5)
    graph.add("PreviewImage", images=captured[1])
    plain = graph.save(graph.draw())
    entry = server.run(to_api(graph))
    name = str(Path("sub", "some"))
    store = open_store(server.base / "models" / "difflens_activations" / name)
    assert torch.equal(store.samples(), latents(server, entry, plain))
    assert store.index.progress == (0.5, 0.75)
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    assert store.index.model == fingerprint(model.state_dict())
    expected = capture(DenoiserSampler(model, 4), 3, 3).activations().values[2:]
    torch.testing.assert_close(store.activations().values, expected, atol=2e-2, rtol=1e-2)

    options = server.object_info()["DiffLensLoadActivations"]["input"]["required"]["store_name"][1]["options"]
    assert name in options
    graph = Avatars()
    loaded = graph.add("DiffLensLoadActivations", store_name=name, site="")
    saved = graph.add("SaveLatent", samples=loaded[1], filename_prefix="latents/test")
    assert torch.equal(latents(server, server.run(to_api(graph)), saved), store.samples())
    graph = Avatars()
    loaded = graph.add("DiffLensLoadActivations", store_name=name, site="attic")
    graph.add("SaveLatent", samples=loaded[1], filename_prefix="latents/test")
    with pytest.raises(HostError, match="Load Activations: site attic was not captured. There is: middle_block"):
        server.run(to_api(graph))


def test_a_capture_draws_on_until_the_rarest_class_has_enough_and_says_what_there_is(server):
    """Of the avatars one in five is feminine; after the four steps of the other tests all look alike, so ten here."""
    graph = Avatars(pictures=16)
    captured = graph.capture(
        pictures=16, steps=10, classifier=graph.classifier[0], attribute="presentation", per_class=6
    )
    labels = graph.add("DiffLensClassify", images=captured[1], classifier=graph.classifier[0], attribute="presentation")
    shown = graph.show(labels[1])
    entry = server.run(to_api(graph))
    drawn = [line.split(",")[1] for line in text_of(entry, shown).splitlines()[1:]]
    assert 16 < len(drawn) <= 128 and len(drawn) % 16 == 0
    assert drawn.count("feminine") >= 6 and drawn[: len(drawn) - 16].count("feminine") < 6
    assert text_of(entry, captured) == f"{drawn.count('masculine')} masculine, {drawn.count('feminine')} feminine"


def test_a_capture_whose_rarest_class_stays_too_rare_says_so_and_is_there(server):
    graph = Avatars(pictures=4)
    captured = graph.capture(pictures=4, classifier=graph.classifier[0], attribute="age", per_class=60)
    saved = graph.add("PreviewImage", images=captured[1])
    entry = server.run(to_api(graph))
    assert "the rarest class is still too rare" in text_of(entry, captured)
    assert len(entry["outputs"][str(saved.id)]["images"]) == 32


def test_training_and_attribution_take_a_store(server):
    graph = Avatars(pictures=32)
    captured = graph.capture(pictures=96, steps=6, save_as="labelled")
    found = graph.attribute(captured, graph.train(captured, 30)[0])
    shown = graph.show(found[2])
    assert text_of(server.run(to_api(graph)), shown).startswith("presentation, by contrastive")


def test_a_capture_and_a_training_can_be_cancelled(server):
    graph = Avatars()
    sae = graph.train(graph.capture(), 1_000_000, save_as="never")
    graph.show(sae[2])
    cancel_in(server, graph, sae)
    assert not list(server.base.rglob("never*"))
    graph = Avatars()
    captured = graph.capture(pictures=2000, steps=20, seed=5)
    graph.add("PreviewImage", images=captured[1])
    cancel_in(server, graph, captured)
    graph = Avatars()
    saved = graph.save(graph.draw(seed=21))
    assert latents(server, server.run(to_api(graph)), saved).std() > 0.1


def test_a_capture_for_which_there_is_no_room_is_refused_after_its_first_batch(server):
    graph = Avatars(pictures=2)
    captured = graph.capture(pictures=65536, steps=40)
    graph.add("PreviewImage", images=captured[1])
    with pytest.raises(HostError, match=r"takes 89\.\d GB in main memory, where \d+\.\d GB are free\. Name a folder"):
        server.run(to_api(graph))


def test_a_capture_without_memory_for_its_batch_goes_on_with_half_of_it_and_says_so(inside, caplog):
    """The network fails for more than two rows; hooks go as they do after any error."""
    model, tried = inside.model("U-Net").clone(), []

    def small(executor, x, *args, **kwargs):
        tried.append(len(x))
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(inside.comfy.patcher_extension.WrappersMP.APPLY_MODEL, "small", small)

    def captured(model):
        latent = inside.latent("U-Net", 4)
        store = inside.host.capture(
            model, inside.prompt("U-Net", 1), latent, 8, 1, "euler", "normal", 5, ("mid_block",)
        )  # fmt: skip
        inside.forget()
        return store

    found, expected = captured(model), captured(inside.model("U-Net"))
    assert tried == [4, 2, 2, 2, 2] and [len(shard["samples"]) for shard in found.shards] == [4, 4]
    assert [record.getMessage() for record in caplog.records if "goes on with 2" in record.getMessage()]
    spread = float(expected.samples().std())
    torch.testing.assert_close(found.samples(), expected.samples(), atol=4e-3 * spread, rtol=4e-3)
    modules = model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_the_time_left_is_told_now_and_then_by_what_was_done(inside):
    clock = inside.pack_module("nodes.host.progress").TimeLeft()
    told = {now: clock.told(done, 100, float(now)) for now, done in ((1, 20), (3, 21), (9, 24), (12, 30), (16, 60))}
    assert told == {1: None, 3: None, 9: "about 3 minutes left", 12: None, 16: "less than a minute left"}
    assert clock.told(100, 100, 20.0) == ""
    words = inside.pack_module("nodes.host.progress").in_words
    assert [words(s) for s in (60, 1200, 7200, 18000)] == [
        "about a minute", "about 20 minutes", "about 2.0 hours", "about 5 hours"
    ]  # fmt: skip
