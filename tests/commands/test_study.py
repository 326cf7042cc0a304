"""A study is read from TOML, and what does not fit is said by its key."""

from __future__ import annotations

import pytest

from difflens_core.commands.study import read_study
from difflens_core.files import DiffLensError

LEAST = {"model": '"m"', "classifier": '"c.safetensors"', "attribute": '"age"', "site": '"mid_block"'}


def written(tmp_path, more: str = "", **keys: str):
    path = tmp_path / "study.toml"
    lines = [f"{key} = {value}" for key, value in (LEAST | keys).items() if value]
    path.write_text("\n".join([*lines, more]))
    return path


def test_what_is_not_said_is_as_in_the_nodes(tmp_path):
    study = read_study(written(tmp_path))
    assert (study.model, study.site, study.prompts, study.target) == ("m", "mid_block", (), "uniform")
    assert study.attribution.method == "class mean difference" and study.attribution.features_per_class == 120
    assert study.folder == tmp_path / "study" and study.path("c.safetensors") == tmp_path / "c.safetensors"


def test_tables_and_lists_are_filled(tmp_path):
    more = "[train]\nlatents = 99\nlr = 1\n[capture]\npictures = 3"
    study = read_study(written(tmp_path, more, prompts='["a man", "a woman"]', size="[64, 96]", cfg="3"))
    assert study.prompts == ("a man", "a woman") and study.size == (64, 96)
    assert study.cfg == 3.0 and isinstance(study.cfg, float)
    assert study.train.latents == 99 and study.train.lr == 1.0 and study.train.k == 32 and study.capture.pictures == 3


@pytest.mark.parametrize(
    ("keys", "more", "said"),
    [
        ({"site": ""}, "", "site is missing"),
        ({"sites": '"x"'}, "", "sites is not known. There are: model, classifier"),
        ({"steps": '"20"'}, "", "steps is '20', expected a int"),
        ({"steps": "true"}, "", "steps is True, expected a int"),
        ({"spare_others": "1"}, "", "spare_others is 1, expected a bool"),
        ({"prompts": '"a man"'}, "", "prompts is 'a man', expected a list"),
        ({"prompts": "[1]"}, "", "prompts is .1., expected a list of str"),
        ({"train": "3"}, "", "train is 3, expected a table"),
        ({}, "[train]\nlatent = 3", "train: latent is not known. There are: latents"),
        ({}, "[train]\nlatents = 3.5", "train: latents is 3.5, expected a int"),
        ({"file": '"x"'}, "", "file is not known"),
        ({}, "=", "is no TOML file"),
    ],
)
def test_what_does_not_fit_is_said_by_its_key(tmp_path, keys, more, said):
    with pytest.raises(DiffLensError, match=f"study.toml.*{said}"):
        read_study(written(tmp_path, more, **keys))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(DiffLensError, match="cannot be read"):
        read_study(tmp_path / "nothing.toml")
    (tmp_path / "study").write_text("")
    with pytest.raises(DiffLensError, match="does not end in .toml"):
        read_study(tmp_path / "study")


def test_what_another_command_makes_is_asked_for_by_its_name(tmp_path):
    study = read_study(written(tmp_path))
    with pytest.raises(DiffLensError, match="sae.safetensors is missing. Run first: difflens train .*study.toml"):
        study.made("sae.safetensors", "train")
