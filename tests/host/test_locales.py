"""Translations: all that nodes and dialogs say is there in every language, and nothing that none of them says."""

from __future__ import annotations

import json
import re

import pytest
from environment import REPOSITORY

from difflens_core.measure import kinds_shown

LANGUAGES = sorted(path.name for path in (REPOSITORY / "locales").iterdir())
# What stays as it is in a translation: names of files and of options with a sign in them, and whole numbers.
AS_IT_IS = re.compile(r"[a-z]+(?:[_/][a-z]+)+|(?<![\d.])\d{2,}(?![\d.])")


def inputs_of(declared: dict, before: str = "") -> dict[str, dict]:
    """Options of each input by its key in a translation, also of those that a choice brings. Not the sliders of Debias:
    they have the names of a recipe's classes."""
    found = {}
    for kind in ("required", "optional"):
        for name, (_, options, *_) in ((name, (*value, {})) for name, value in declared.get(kind, {}).items()):
            if name.endswith(" %"):
                continue
            found[key := f"{before}{name}"] = options
            for choice in options.get("options") or []:
                found |= inputs_of(choice["inputs"], f"{key}_") if isinstance(choice, dict) else {}
    return found


def said(name: str, info: dict) -> dict[str, str]:
    """All that a node says in English, by its place in a translation. An output without a name has its type's."""
    found = {f"{name}.display_name": info["display_name"], f"{name}.description": info["description"]}
    for key, options in inputs_of(info["input"]).items():
        found |= {f"{name}.inputs.{key}.name": key, f"{name}.inputs.{key}.tooltip": options["tooltip"]}
    for number, (kind, output, tooltip) in enumerate(
        zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    ):
        found[f"{name}.outputs.{number}.tooltip"] = tooltip
        if output != kind:
            found[f"{name}.outputs.{number}.name"] = output
    return found


def flat(tree: dict, before: str = "") -> dict[str, str]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


@pytest.fixture(scope="module")
def served(server) -> dict:
    """What ComfyUI hands to its page."""
    return json.loads(server.request("/i18n"))


@pytest.fixture(scope="module")
def english(object_info) -> dict[str, str]:
    nodes = {name: info for name, info in object_info.items() if name.startswith("DiffLens")}
    return {key: text for name, info in nodes.items() for key, text in said(name, info).items()}


def test_the_reader_sees_what_a_choice_brings(english):
    assert {"DiffLensDebias.inputs.recipe_mix.tooltip", "DiffLensCompare.inputs.rows.name"} <= english.keys()
    assert "DiffLensSteer.outputs.0.name" not in english and len(english) > 500 and {"fr", "zh"} <= {*LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_says_all_that_the_nodes_say(served, english, language):
    own = flat(served[language]["nodeDefs"])
    missing, stale = english.keys() - own.keys(), own.keys() - english.keys()
    assert not missing and not stale, f"missing: {sorted(missing)}; stale: {sorted(stale)}"
    for key, text in own.items():
        assert text.strip(), f"{key} is empty"
        if key.endswith(("tooltip", "description")):
            lost = {*AS_IT_IS.findall(english[key])} - {*AS_IT_IS.findall(text)}
            assert not lost and text != english[key], f"{key} lacks {lost} of: {english[key]}"
        if not key.endswith("tooltip"):  # read as a pattern, in which these mean something
            assert not {*"{}@|"} & {*text}, key


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_says_all_that_the_dialogs_say(server, served, language):
    files = (server.pack / "web").rglob("*.js")
    found = [re.findall(r'\bt\(\s*"([^"]+)"', path.read_text(encoding="utf-8")) for path in files]
    shown = {*sum(found, []), *kinds_shown("").values()}
    own = served[language]["difflens"]
    assert len(shown) > 100
    missing, stale = shown - own.keys(), own.keys() - shown
    assert not missing and not stale, f"missing: {sorted(missing)}; stale: {sorted(stale)}"
    for text, told in own.items():
        assert sorted(re.findall(r"{\w+}", told)) == sorted(re.findall(r"{\w+}", text)), text
