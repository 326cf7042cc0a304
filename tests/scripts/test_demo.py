"""The demo without a server: what it asks ComfyUI for, its tables, and its progress where there is no terminal."""

from __future__ import annotations

import demo
import pytest

RECIPES = demo.REPOSITORY / "models" / "avatars" / "difflens_recipes"
RESULT = {
    "n": 64, "fd_before": 0.505, "fd_after": 0.0, "fd_after_ci": [0.0, 0.031], "success": 1.0,
    "kept": {"age": 0.95, "skin_tone": 0.96, "background": 0.99, "clothes": 0.9, "glasses": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def workflow():
    return demo.load_workflow("01_debias_the_avatars")


def upstream(prompt: dict, node_id: str) -> dict:
    """A node and all that it is made from, by id."""
    found = {node_id: prompt[node_id]}
    for value in prompt[node_id]["inputs"].values():
        if isinstance(value, list):
            found |= upstream(prompt, value[0])
    return found


def recipe_of(prompt: dict) -> str:
    return prompt[demo.find(prompt, "DiffLensDebias")]["inputs"]["recipe"]


def test_every_attribute_has_its_recipe(workflow):
    shipped = demo.shipped_runs(workflow, 96)
    assert list(shipped) == [*demo.ATTRIBUTES]
    for name, prompt in shipped.items():
        assert (RECIPES / recipe_of(prompt)).is_file() and name in recipe_of(prompt)
        assert prompt[demo.find(prompt, "DiffLensReport")]["inputs"]["attribute"] == name
        assert prompt[demo.find(prompt, "EmptyLatentImage")]["inputs"]["batch_size"] == 96


def test_the_pictures_before_are_the_same_for_all_so_that_comfyui_draws_them_once(workflow):
    before = []
    for prompt in demo.shipped_runs(workflow, 64).values():
        report = prompt[demo.find(prompt, "DiffLensReport")]
        before.append(upstream(prompt, report["inputs"]["before"][0]))
        assert "DiffLensDebias" not in {node["class_type"] for node in before[-1].values()}
    assert all(nodes == before[0] for nodes in before)


def test_a_changed_workflow_leaves_the_one_it_is_made_from_as_it_was(workflow):
    assert demo.changed(workflow, {"EmptyLatentImage": {"batch_size": 2}}) != workflow
    assert workflow == demo.load_workflow("01_debias_the_avatars")


def test_the_way_to_features_is_only_made_smaller():
    whole = demo.load_workflow("02_find_the_bias_features,_train_an_SAE")
    fewer = demo.changed(whole, demo.FEWER)
    others = [node_id for node_id in whole if whole[node_id] != fewer[node_id]]
    assert sorted(whole[node_id]["class_type"] for node_id in others) == sorted(demo.FEWER)
    for node_id in others:
        for name, value in fewer[node_id]["inputs"].items():
            assert value == whole[node_id]["inputs"][name] or value < whole[node_id]["inputs"][name]


def test_a_table_keeps_its_columns_and_leaves_out_the_attribute_that_was_steered():
    head, row = demo.table("Shipped recipes, n = 64", {"presentation": RESULT}).splitlines()[1:]
    for label, share in (("pres.", "-"), (" age", "95%"), ("skin", "96%"), ("backgr.", "99%"), ("clothes", "90%")):
        end = head.index(label) + len(label)
        assert row[:end].endswith(" " + share)
    assert "0.505" in row and "0.000 [0.000, 0.031]" in row and "100%" in row


def test_without_a_terminal_a_long_run_tells_of_itself_but_does_not_flood(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    display = demo.Display(5)
    display.start("age", {"3": {"class_type": "DiffLensCapture"}})
    for step in range(1000):
        now[0] += 0.065
        display.update({"3": {"state": "running", "value": step + 1, "max": 1000}})
    display.finish()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[-1].endswith("done")
    assert lines[0].split() == ["1/5", "age", "10", "s", "Capture", "154/1000"]
