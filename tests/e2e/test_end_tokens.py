"""Whole jobs on a model whose chat template closes turns with a token that its files do not name as an end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from aligner.models.read_spec import read_spec
from tests.e2e.conftest import Task

CLOSING = "~"
RULE = '''
def ends_once(prompt, response, **fields):
    """1 where the closing token is the last or absent, with the special tokens to be seen; -1 otherwise."""
    return 1.0 if "~" not in response[:-1] else -1.0


def blind(prompt, response, **fields):
    """1 where it is not seen at all."""
    return float("~" not in response)
'''


@pytest.fixture
def base_model(task: Task, tmp_path: Path) -> Path:
    """The task's model with ~ as a special token that closes assistants' turns; its end token stays <eos>."""
    folder = tmp_path / "base"
    shutil.copytree(task.folder / "model", folder)
    close_turns_otherwise(folder)
    (tmp_path / "rules.py").write_text(RULE)
    return folder


def close_turns_otherwise(folder: Path) -> None:
    """Make ~ a special token, and the chat template close assistants' turns with it in place of <eos>."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = tokenizer["model"]["vocab"][CLOSING]
    added = {key: False for key in ("single_word", "lstrip", "rstrip", "normalized")}
    tokenizer["added_tokens"].append({"id": token, "content": CLOSING, "special": True, **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("eos_token", f"'{CLOSING}'")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def with_long_rows(task: Task, folder: Path) -> Path:
    """The task's 64 prompts, and 2 that are too long."""
    rows = (task.folder / "prompts.jsonl").read_text().splitlines()
    long = json.dumps({**json.loads(rows[0]), "prompt": "1+" * 30})
    (folder / "prompts.jsonl").write_text("\n".join([*rows, long, long]))
    return folder / "prompts.jsonl"


def test_generation_stops_at_it_and_the_export_names_it(
    torchrun: Callable[..., Any], task: Task, base_model: Path, tmp_path: Path
) -> None:
    closing = AutoTokenizer.from_pretrained(base_model).convert_tokens_to_ids(CLOSING)
    own = read_spec(base_model).eos_token_ids
    assert own == (2,), "the files do not name it"
    rules = {"seen": "ends_once", "unseen": "blind"}
    settings = [f"+reward.components.{name}.rule={tmp_path}/rules.py:{rule}" for name, rule in rules.items()]
    base = [one for one in task.overrides(tmp_path / "run") if not one.startswith(("model.path", "reward.rule"))]
    done = torchrun(
        1,
        ["-m", "aligner.main", *base, f"model.path={base_model}", "reward.rule=''", *settings,
         "+reward.components.seen.keep_special_tokens=true", "train.steps=1", "train.save=true",
         f"data.path={with_long_rows(task, tmp_path)}", "data.too_long=drop",
         "data.prompts_per_step=24", "algorithm.group_size=8", "logging.samples_every=1", "logging.samples_count=192"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    said = f"config.json <eos> (2), generation_config.json <eos> (2), the tokenizer <eos> (2), the chat template ~ ({closing})"
    assert f"what ends a turn differs: {said}" in " ".join((done.stdout + done.stderr).split())
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["reward/seen"] == row["reward/unseen"] == 1.0, "a response went on behind it, or the blind rule saw it"
    assert row["data/left_out"] == 2
    assert "rows of data.path left out: too long: 2" in done.stdout + done.stderr
    assert row["truncated"] < 0.9, "some responses ended by themselves"
    found = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert found.eos_token_id == [2, closing]
    assert read_spec(tmp_path / "run" / "model").eos_token_ids == (2, closing)


def test_mode_check_shows_what_ends_responses(
    torchrun: Callable[..., Any], task: Task, base_model: Path, tmp_path: Path
) -> None:
    base = [one for one in task.overrides(tmp_path / "run") if not one.startswith("model.path")]
    path = with_long_rows(task, tmp_path)
    again = [f"data.path={path}", "data.too_long=drop", "rollout.max_model_len=null"]
    done = torchrun(1, ["-m", "aligner.main", *base, f"model.path={base_model}", "mode=check", *again])
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"ends +turns end with <eos> \(2\) and ~ \(\d+\); at most 36 tokens with the prompt\n", done.stdout
    )
    assert "note: what ends a turn differs: config.json <eos> (2)" in done.stdout
    assert "64 rows (prompts), 2 left out (too long: 2)" in done.stdout
