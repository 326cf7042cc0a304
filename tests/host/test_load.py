"""SAEs and feature files of other programs in the user's folders: listed, loaded, and put to use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expected import sampled, shipped
from graphs import Graph, Node, to_api
from host import HostError, Server
from safetensors.torch import save_file
from small_graphs import AVATARS, Avatars, foreign_sae, latents, text_of

from difflens_core.sae import SparseAutoencoder, load_sae
from difflens_core.steer import recipe_from_features


def test_an_sae_of_another_program_is_listed_by_its_folder_and_loads(server):
    foreign_sae(server, "mine/middle_block.0")
    foreign_sae(server, "named by the user")
    options = server.object_info()["DiffLensLoadSAE"]["input"]["required"]["sae_name"][1]["options"]
    assert {"mine/middle_block.0", "named by the user", "avatars.safetensors"} <= set(options)
    assert not [name for name in options if name.endswith(("sae.safetensors", ".json"))]
    graph = Graph("saes")
    graph.group("all")
    shown = []
    for name, site in (("mine/middle_block.0", ""), ("named by the user", "middle_block"), ("avatars.safetensors", "")):
        loaded = graph.add("DiffLensLoadSAE", sae_name=name, site=site)
        shown.append(graph.add("PreviewAny", source=loaded[1]))
    entry = server.run(to_api(graph))
    texts = [text_of(entry, node) for node in shown]
    assert "sparsify" in texts[0] and "topk, k 2" in texts[0] and "the output of middle_block.0" in texts[0]
    assert "the output of middle_block\n" in texts[1] + "\n" and "format: DiffLens" in texts[2]


def feature_files(server: Server, sae: SparseAutoencoder) -> dict[str, list[int]]:
    """Files as the reference DiffLens writes them, in a folder below an SAE's; returns 12 latents of each class."""
    folder = server.base / "models" / "difflens_saes" / "paper" / "age"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = shipped("age")
    chosen = {name: recipe.features[own][:12].tolist() for name, own in zip(recipe.classes, recipe.member, strict=True)}
    for name, features in chosen.items():
        positions = torch.arange(len(features)) % 5
        torch.save(
            torch.cat([positions * sae.latents + torch.tensor(features), torch.tensor(features[:1])]),
            folder / f"{name}.pt",
        )
    save_file({"encoder": torch.ones(1)}, folder.parent / "odd.safetensors")
    return chosen


def test_feature_files_of_the_paper_steer_a_stock_graph(server):
    sae = load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")
    chosen = feature_files(server, sae)
    info = server.object_info()
    folder = str(Path("paper", "age"))
    assert info["DiffLensLoadFeatures"]["input"]["required"]["folder"][1]["options"] == [folder]
    names = info["DiffLensLoadSAE"]["input"]["required"]["sae_name"][1]["options"]
    assert not [name for name in names if name.endswith(".pt")] and str(Path("paper", "odd.safetensors")) in names

    def steered(graph: Avatars, with_sae: bool, **settings: object) -> tuple[Node, Node]:
        inputs = {"attribute": "", "classes": "young, senior", "features_per_class": "12, 7", "strength": "0.5, 3"}
        loaded = graph.sae()
        features = graph.add("DiffLensLoadFeatures", folder=folder, sae=loaded, **{**inputs, **settings})
        node = graph.steer(features[0], **({"sae": loaded} if with_sae else {}))
        return graph.save(graph.draw(node[0])), features

    graph = Avatars(pictures=4)
    scaled, features = steered(graph, True, mode="scale")
    saved = scaled, steered(graph, False, mode="add own fixed")[0]
    shown = graph.show(features[1])
    entry = server.run(to_api(graph))
    text = text_of(entry, shown)
    assert text.startswith("age, at middle_block\nyoung: 12 features, #") and "\nsenior: 7 features, #" in text
    wanted = {"young": chosen["young"], "senior": chosen["senior"][:7]}
    plain = sampled([], 4)
    for node, mode, given in zip(saved, ("scale", "add own fixed"), (sae, None), strict=True):
        expected = sampled([recipe_from_features(sae, "age", wanted, mode, (0.5, 3.0))], 4, sae=given)
        torch.testing.assert_close(latents(server, entry, node).clamp(-1, 1), expected, atol=2e-3, rtol=0)
        assert float((expected - plain).abs().amax(dim=(1, 2, 3)).min()) > 0.05

    for settings, phrase in (
        ({"mode": "scale"}, "Steer: recipe for age: mode 'scale' must know where the latents are active"),
        ({"mode": "scale", "strength": "1, 2, 3"}, "Load Feature Files: strength .* 2 in the order young, senior"),
        ({"mode": "scale", "classes": "old"}, "Load Feature Files: age has no feature file of old, but adult, senior"),
    ):
        graph = Avatars()
        steered(graph, False, **settings)
        with pytest.raises(HostError, match=phrase):
            server.run(to_api(graph))
