"""tools/generate.py --environment: whole episodes of a model's folder, the same again, with transformers' log-probabilities."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.rollout.kind import Place
from tests import fork_server
from tests.conftest import ROOT
from tests.e2e.conftest import Task, task

__all__ = ["task"]

GAME = '''
class Game:
    """Three turns; what it says and pays is made of what was said before and of its seed."""

    def __init__(self, size):
        self.size = size

    def reset(self, row, seed):
        self.seed, self.turn = seed, 0
        return str(seed % self.size)

    def step(self, text):
        self.turn += 1
        said = sum(map(ord, text)) + self.seed
        return str(said), (said % 10) / 10, self.turn == 3
'''
TEMPLATE = (
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '=' }}{% endfor %}"
)


def generate(task: Task, folder: Path, name: str, *more: str) -> list[dict[str, Any]]:
    (folder / "game.py").write_text(GAME)
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = (task.folder / "prompts.jsonl").read_text().splitlines()[:4]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    command = [
        sys.executable, str(ROOT / "tools" / "generate.py"), "--model", str(task.folder / "model"), "--input", str(folder / "rows.jsonl"),
        "--output", str(folder / name), "--chat-template", str(folder / "template.jinja"), "--max-tokens", "6", "--num-samples", "2",
        "--kv-cache-mib", "16", "--logprobs", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = fork_server.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("engine", ["vllm", pytest.param("transformers", marks=pytest.mark.matrix)])
@torch.no_grad()
def test_episodes_are_written(task: Task, tmp_path: Path, engine: str) -> None:
    settings = [
        "--engine",
        engine,
        "--environment",
        f"target={tmp_path}/game.py:Game",
        "+options.size=97",
        "processes=1",
    ]
    lines = generate(task, tmp_path, "out.jsonl", *settings)
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    model = AutoModelForCausalLM.from_pretrained(task.folder / "model")
    for line in lines:
        assert line["finish"] == ["done", "done"] and [one["turns"] for one in line["episodes"]] == [3, 3]
        for sample in range(2):
            tokens, turn = line["token_ids"][sample], torch.tensor(line["turn_of_token"][sample])
            assert int((turn > 0).sum()) == line["tokens"][sample] and int(turn.max()) == 3
            expected = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            expected_T = expected.gather(1, torch.tensor(tokens)[1:, None])[:, 0]
            gap_T = (expected_T - torch.tensor(line["logprobs"][sample])[1:]).abs()
            assert float(gap_T[turn[1:] > 0].max()) < 1e-4
            messages = line["episodes"][sample]["messages"]
            seed = Place(0, -1, line["index"], sample).environment_seed
            opening, *told = [message["content"] for message in messages if message["role"] == "user"]
            assert opening.endswith(str(seed % 97)) and len(told) == 3
            assert line["reward"][sample] == pytest.approx(sum(int(number) % 10 / 10 for number in told))
    again = generate(task, tmp_path, "again.jsonl", *settings)
    assert again == lines
