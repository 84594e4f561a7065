"""What a run reads besides its settings: each change of it is told when the run goes on, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.checkpoint.claim import Start, claim
from aligner.config.as_json import config_as_json
from aligner.config.changes import check_changes
from aligner.config.schema import Config, compose_config, to_config
from aligner.data.sets import DataSets, read_sets
from aligner.data.tokenizer import load_tokenizer
from aligner.run.input_digests import inputs_of
from aligner.run.prepare import prepare
from aligner.run.resume import check_resumed, compare
from tests.e2e.conftest import Task, task

__all__ = ["task"]


@pytest.fixture
def own(task: Task, tmp_path: Path) -> Path:
    """The task's files, to be changed."""
    return Path(shutil.copytree(task.folder, tmp_path / "task"))


def config(own: Path, *more: str) -> Config:
    overrides = [*Task(own).overrides(own.parent / "run")[1:], *more]
    return to_config(compose_config(overrides, "quickstart"))


def digests(own: Path) -> dict[str, str]:
    found = config(own)
    return inputs_of(found, ["policy", "rollout", "reward"], read_sets(found.data, load_tokenizer(found.model.path)))


def edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def other_template(own: Path) -> None:
    (own / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")


def other_weights(own: Path) -> None:
    """A tensor near the end, as another checkpoint of the same model would have it."""
    edit(own / "model" / "model.safetensors", lambda raw: raw[:-64] + bytes(64))


def swapped(raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    return b"".join([lines[1], lines[0], *lines[2:]])


CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "nothing": (lambda own: None, set()),
    "touched": (lambda own: (own / "model" / "model.safetensors").touch(), set()),
    "rows sorted": (lambda own: edit(own / "prompts.jsonl", swapped), {"rows of data.path"}),
    "an answer fixed": (
        lambda own: edit(own / "prompts.jsonl", lambda raw: raw.replace(b'"answer": "', b'"answer": "0', 1)),
        {"rows of data.path"},
    ),
    "other line ends": (lambda own: edit(own / "prompts.jsonl", lambda raw: raw.replace(b"\n", b"\r\n")), set()),
    "held-out rows": (lambda own: edit(own / "heldout.jsonl", swapped), {"rows of data.eval_path"}),
    "a rule": (lambda own: edit(own / "rule.py", lambda raw: raw + b"\n# x\n"), {"source of reward.rule"}),
    "weights": (other_weights, {"weights of model.path"}),
    "a chat template": (other_template, {"configuration and tokenizer of model.path"}),
}


@pytest.mark.parametrize("which", CHANGES)
def test_each_change_is_told(which: str, own: Path) -> None:
    change, told = CHANGES[which]
    before = digests(own)
    change(own)
    after = digests(own)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == told


def test_a_loop_of_ones_own_is_an_input_and_ours_is_not(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_loop_of_mine.py").write_text("def loop(roles, batches, cfg):\n    yield\n")
    mine = config(own, "algorithm._target_=a_loop_of_mine.loop")
    data = DataSets([])
    before = inputs_of(mine, ["policy"], data)
    assert "source of algorithm._target_" in before
    assert "source of algorithm._target_" not in inputs_of(config(own), ["policy"], data)
    (tmp_path / "a_loop_of_mine.py").write_text("def loop(roles, batches, cfg):\n    yield 1\n")
    assert inputs_of(mine, ["policy"], data) != before


def test_a_change_stops_the_job_before_models_are_built(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the checkpoint's own file, by the job's preparation; accepted, it is listed."""
    job = prepare(config(own), 2)
    run_dir = own.parent / "run"
    claim(run_dir, Start.NEW)
    folder = run_dir / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"config": config_as_json(job.config, job.mask), "inputs": job.inputs}
    (folder / "state.json").write_text(json.dumps(state))
    prepare(config(own), 2)
    edit(own / "prompts.jsonl", swapped)
    with pytest.raises(ValueError, match=r"(?s)other settings or contents:\n  rows of data\.path: digest \w{32} -> \w{32}\n"
                                         r".*checkpoint\.accept_changes=true"):  # fmt: skip
        prepare(config(own), 2)
    accepted = prepare(config(own, "checkpoint.accept_changes=true"), 2)
    settings = config_as_json(accepted.config, accepted.mask)
    compare(state, settings, accepted.inputs, accepted=True, say=True)
    assert "going on with changed settings or contents:\n  rows of data.path: digest" in capsys.readouterr().err
    del state["inputs"]
    (folder / "state.json").write_text(json.dumps(state))
    check_resumed(accepted.config, settings, accepted.inputs)
    job = prepare(config(own), 2)
    compare(state, config_as_json(job.config, job.mask), accepted.inputs, accepted=False, say=True)
    assert capsys.readouterr().err.count("an earlier version") == 1
    (folder / "state.json").write_text("{")
    check_resumed(accepted.config, settings, accepted.inputs)  # damage is found, and passed over, by the loader


def test_only_what_both_know_is_compared() -> None:
    check_changes({}, {}, False, False, ({"a": "1", "gone": "2"}, {"a": "1", "new": "3"}))
    with pytest.raises(ValueError, match="a: digest 1 -> 2"):
        check_changes({}, {}, False, False, ({"a": "1"}, {"a": "2"}))
