"""~ and environment variables in every setting that is a path, and in the tools' options."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aligner.bounds import check_settings
from aligner.config.schema import Config, compose_config, to_config
from aligner.paths import SETTINGS, expanded, path_option, quoted_tilde
from aligner.reward.components import reward_components
from tools.generate import options

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME and what a cluster sets."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/it's mine")
    monkeypatch.setenv("RUNS", "~/runs")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


def config(*overrides: str) -> Config:
    return to_config(compose_config(["model.path=m", *overrides]))


def at(found: Config, key: str) -> Any:
    value: Any = found
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("~/it's", "/home/me/it's"),
        ("~", "/home/me"),
        ("$SCRATCH/a", "/scratch/it's mine/a"),
        ("${SCRATCH}/a.jsonl", "/scratch/it's mine/a.jsonl"),
        ("${oc.env:HOME}/a", "/home/me/a"),
        ("$RUNS/a", "/home/me/runs/a"),  # a variable may begin with ~
        ("${oc.env:RUNS}/a", "/home/me/runs/a"),
        ("${oc.env:HOME}/$SCRATCH/${SCRATCH}", "/home/me//scratch/it's mine//scratch/it's mine"),
        ("a/${seed}/b", "a/0/b"),  # a setting's value
        ("'a/~/b~'", "a/~/b~"),  # a name like others
    ],
)
def test_every_path_setting(written: str, found: str) -> None:
    keys = [
        "model.path",
        "data.path",
        "data.eval_path",
        "data.chat_template",
        "run_dir",
        "critic.path",
        "reward_model.path",
        "+algorithm.out",
    ]
    assert set(SETTINGS) == {key.lstrip("+") for key in keys}
    configured = config(*(f"{key}={written}" for key in keys))
    assert {key: at(configured, key.lstrip("+")) for key in keys} == dict.fromkeys(keys, found)


def test_rules_in_files() -> None:
    one = config("reward.rule=~/rules.py:score")
    assert reward_components(one.reward)[0].component.rule == "/home/me/rules.py:score"
    several = config(
        "reward.rule=''", "+reward.components.a.rule=${SCRATCH}/r.py:f", "+reward.components.b.rule=x.y.$Z"
    )
    assert [part.component.rule for part in reward_components(several.reward)] == [
        "/scratch/it's mine/r.py:f",
        "x.y.$Z",
    ]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("$NOWHERE/a", "run_dir=$NOWHERE/a: the environment variable NOWHERE has no value; set it"),
        ("${NOWHERE}/a", "run_dir=$NOWHERE/a: the environment variable NOWHERE has no value"),
        ("$EMPTY/a", "run_dir=$EMPTY/a: the environment variable EMPTY has no value"),
        ("~nobody-of-this-name/a", "there is no home folder for ~nobody-of-this-name"),
    ],
)
def test_what_stands_for_nothing_is_refused(written: str, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        config(f"run_dir={written}")
    assert said in str(error.value)


def test_a_file_of_such_a_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$NOWHERE.jsonl").touch()
    assert expanded("a$NOWHERE.jsonl", "data.path") == "a$NOWHERE.jsonl"
    (tmp_path / "$NOWHERE").mkdir()
    assert expanded("$NOWHERE/run", "run_dir") == "$NOWHERE/run"
    (tmp_path / "$HOME").mkdir()
    assert expanded("$HOME/run", "run_dir") == "/home/me/run", "a variable that is set is meant"
    assert expanded("cost$", "data.path") == "cost$"
    assert expanded("cost$5", "data.path") == "cost$5"


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ("a.b=~/x y", "a.b='~/x y'"),
        ("+a.b=~", "+a.b='~'"),
        ("~algorithm.group_size", "~algorithm.group_size"),
        ("a=b~", "a=b~"),
        ("a='~/x'", "a='~/x'"),
    ],
)
def test_what_hydra_is_given(override: str, quoted: str) -> None:
    assert quoted_tilde(override) == quoted


def test_the_configuration_shows_the_path_that_is_meant() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aligner.main", "--cfg", "job", "model.path=$HOME/m", "run_dir=~/r"],
        capture_output=True, text=True, cwd=ROOT, timeout=60, env={**os.environ, "HOME": "/home/me"},
    )  # fmt: skip
    assert "path: /home/me/m\n" in done.stdout and "run_dir: /home/me/r\n" in done.stdout, done.stderr


def test_options_of_tools() -> None:
    given = options().parse_args(["--model", "~/m", "--input", "$SCRATCH/i", "--output", "${HOME}/o"])
    assert (given.model, given.input, given.output) == (
        Path("/home/me/m"), Path("/scratch/it's mine/i"), Path("/home/me/o"),
    )  # fmt: skip
    with pytest.raises(argparse.ArgumentTypeError, match=r"^\$NOWHERE: the environment variable NOWHERE has no value"):
        path_option("$NOWHERE")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run_dir="], "run_dir has no value; give a folder, such as run_dir=runs/first."),
        (["run_dir=' '"], "run_dir has no value"),
        (["model.path="], "model.path has no value; give a folder"),
    ],
)
def test_an_empty_folder_is_refused(overrides: list[str], said: str) -> None:
    """ "" would be the folder that the job is started in."""
    with pytest.raises(ValueError, match=said):
        check_settings(config(*overrides))


def test_an_empty_file_is_refused() -> None:
    from aligner.data.sets import read_sets

    tokenizer: Any = None
    with pytest.raises(ValueError, match=r"data\.path is not set; give a file"):
        read_sets(replace(config().data, path=""), tokenizer)
