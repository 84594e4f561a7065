"""tools/replay.py: what is shown of an episode, and recorded log-probabilities beside those of a model, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.config.as_json import config_as_json
from aligner.config.schema import compose_config, to_config
from aligner.config.secrets import Mask
from aligner.report.sample_records import RecordedTurn, SampleRecord, write_records
from tests.e2e.conftest import Task, task
from tools.replay import compare_logprobs, main, read_run, shown, tool_calls

__all__ = ["task"]

TEMPERATURE = 0.7


def episode(tokenizer: Any, model: Path) -> SampleRecord:
    """Two segments, three turns; of other weights the first. Its log-probabilities are computed in float64, token by token."""
    parts = [("<bos>12+3=", 0), ("15", 1), (" 7", 0), ("22", 2), ("<bos>9+", 0), ("4", 3)]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
    tokens, spans = [], []
    for (_, turn), part in zip(parts, ids, strict=True):
        if turn:
            spans.append((turn, len(tokens), len(tokens) + len(part)))
        tokens += part
    second = sum(map(len, ids[:4]))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()

    @torch.no_grad()
    def logp(place: int) -> float:
        context = tokens[second if place >= second else 0 : place]
        logits = network(torch.tensor([context])).logits[0, -1].double() / TEMPERATURE
        return float(logits.log_softmax(-1)[tokens[place]])

    turns = [
        RecordedTurn(number, start, stop, [logp(place) for place in range(start, stop)], [3 if number > 1 else 2] * (stop - start), 0.5 * number)
        for number, start, stop in spans
    ]  # fmt: skip
    call = {"function": {"name": "add", "arguments": {"a": 12, "b": 3}}}
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "few-shot"}]
    said += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": " 7"}]
    said += [{"role": "assistant", "content": "22"}, {"role": "assistant", "content": "4"}]
    return SampleRecord(
        row=1, prompt_index=0, fields={"prompt": parts[0][0]}, tokens=tokens, prompt_tokens=len(ids[0]), turns=turns,
        segments=[0, second], truncated=False, reward=3.0, status="ok", components={"game": 3.0}, episode_reward=3.0,
        episode={"ended": "done", "detail": "won\x1b", "seed": 1, "messages": said, "metrics": {"moves": 3.0}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the samples of step 4."""
    folder, model = tmp_path_factory.mktemp("run"), task.folder / "model"
    settings = [f"model.path={model}", f"run_dir={folder}", f"sampling.temperature={TEMPERATURE}"]
    config = to_config(compose_config(settings, "quickstart"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config_as_json(config, Mask())))
    record = episode(AutoTokenizer.from_pretrained(model), model)
    write_records(folder, 4, [replace(record, row=0), record])
    return folder


def test_it_is_shown_turn_by_turn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "4", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "row 1: reward 3.000 (ok), 3 turns, 5 sampled of 16 tokens, 2 segments",
        "ended: done (won\\x1b)", "game 3, moves 3", "--- segment 1",
    ]  # fmt: skip
    assert lines[4] == "<bos>12+3=" and lines[6] == "[+15+]"
    assert lines[5].startswith("--- turn 1: 2 tokens, reward 0.500, log p -") and lines[5].endswith(", weights 2")
    assert lines[7] == "    calls add({'a': 12, 'b': 3})" and lines[8] == " 7"
    assert lines[10:13] == ["[+22+]", "--- segment 2", "<bos>9+"] and lines[14] == "[+4+]" and len(lines) == 15
    assert main([str(run), "4", "1", "--color", "always"]) == 0
    assert "\x1b[32m15\x1b[0m" in capsys.readouterr().out


def test_log_probabilities_are_those_of_each_segment(run: Path, task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(task.folder / "model")
    assert main([str(run), "4", "1", "--model", model]) == 0
    assert "log-probabilities of 3 tokens of weights 3 differ by at most" in capsys.readouterr().out
    assert main([str(run), "4", "1", "--model", model, "--version", "2"]) == 0
    assert "of 2 tokens of weights 2" in capsys.readouterr().out
    assert main([str(run), "4", "1", "--model", model, "--version", "7"]) == 2
    assert "no token was sampled by weights 7; use one of 2, 3" in capsys.readouterr().err


def test_other_log_probabilities_are_found(run: Path, task: Task) -> None:
    config, model = read_run(run), task.folder / "model"
    record = episode(AutoTokenizer.from_pretrained(model), model)
    exact = compare_logprobs(record, model, config.sampling, None)
    assert exact.compared == 3 and exact.left_out == 2 and exact.largest < 1e-5
    last = replace(record.turns[2], logp=[(record.turns[2].logp[0] or 0.0) + 0.01])
    off = compare_logprobs(replace(record, turns=[*record.turns[:2], last]), model, config.sampling, 3)
    assert off.largest == pytest.approx(0.01, abs=1e-5)
    # as one context the second segment's token would have another probability
    joined = compare_logprobs(replace(record, segments=[0]), model, config.sampling, 3)
    assert joined.largest > 1e-3
    with pytest.raises(ValueError, match=r"top_p=0\.9 and top_k=0"):
        compare_logprobs(record, model, replace(config.sampling, top_p=0.9), None)


def test_what_is_not_there_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path), "4", "0"], "has no config.yaml; give the run_dir of a job"),
        ([str(run), "5", "0"], "no samples of step 5: it has those of steps 4"),
        ([str(run), "4", "2"], "keeps rows 0 to 1, not 2"),
        ([str(run), "4", "1", "--again"], "the run has no environment (environment.target)"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_response_is_shown_as_one_turn(task: Task) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task.folder / "model")
    record = replace(
        episode(tokenizer, task.folder / "model"), episode=None, segments=[0], reward=None, status="failed",
        turns=[RecordedTurn(1, 6, 8, [], [])], tokens=tokenizer.encode("<bos>12+3=15", add_special_tokens=False),
    )  # fmt: skip
    assert tool_calls(record) == {}
    assert list(shown(record, tokenizer, False)) == [
        "row 1: no reward (failed), 1 turns, 2 sampled of 8 tokens", "game 3", "<bos>12+3=", "--- turn 1: 2 tokens",
        "[+15+]",
    ]  # fmt: skip
