"""A job that exports each step and the best: each folder is the policy of its step, as transformers computes it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import fork_server
from tests.e2e.conftest import Task

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
import torch
from dataclasses import dataclass

from aligner.algorithms.grpo import GrpoConfig, grpo


@dataclass(frozen=True)
class LoopConfig(GrpoConfig):
    out: str = ""


def loop(roles, prompts, cfg: LoopConfig):
    for step, result in enumerate(grpo(roles, prompts, cfg), start=1):
        logp_BT = roles.policy.logprobs(result.samples).gather()
        samples = result.samples.gather()
        if roles.policy.world.rank == 0:
            torch.save((samples.tokens_BT, samples.mask_BT, logp_BT), f"{cfg.out}/step_{step}.pt")
        yield result
"""


@pytest.mark.matrix
def test_each_step_and_the_best(job: Callable[..., list[dict[str, Any]]], task: Task, tmp_path: Path) -> None:
    (tmp_path / "my_loop.py").write_text(LOOP)
    rows = job(
        2, "algorithm._target_=my_loop.loop", f"+algorithm.out={tmp_path}", "policy.optimizer.lr=3e-3", "train.steps=4",
        "train.save=true", "train.eval_every=2", "train.export_every=1", "train.export_keep=3", "train.keep_best=true",
    )  # fmt: skip
    run = tmp_path / "run0"
    evaluated = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    assert sorted(evaluated) == [0, 2, 4] and len(set(evaluated.values())) > 1
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    assert json.loads((run / "best" / "best.json").read_text()) == {
        "metric": "accuracy",
        "step": best,
        "value": evaluated[best],
    }
    assert (run / "best").resolve() == run / "exports" / f"step_{best}"
    assert {path.name for path in (run / "exports").iterdir()} == {f"step_{step}" for step in (2, 3, 4, best)}
    gaps = {}
    for step in (2, 3, 4):
        model = AutoModelForCausalLM.from_pretrained(run / "exports" / f"step_{step}")
        gaps[step] = [gap(model, tmp_path / f"step_{other}.pt") for other in (2, 3, 4)]
        assert gaps[step][step - 2] < 1e-4, gaps
        assert min(found for other, found in enumerate(gaps[step], start=2) if other != step) > 1e-2, gaps
    assert weights(run / "exports" / "step_4") == weights(run / "model")
    assert answered(task, run / "best", tmp_path / "answers.jsonl") == pytest.approx(evaluated[best], abs=1e-6)


def answered(task: Task, model: Path, out: Path) -> float:
    """The mean reward of tools/generate.py's answers to the held-out prompts, with the seed of the job's evaluations."""
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--model", str(model), "--output", str(out),
               "--input", str(task.folder / "heldout.jsonl"), "--max-tokens", "20", "--kv-cache-mib", "16"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = fork_server.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [json.loads(line)["response"][0] for line in out.read_text().splitlines()]
    return sum(sum(c.isdigit() for c in text) / max(1, len(text)) + 0.01 * len(text) for text in texts) / len(texts)


@torch.no_grad()
def gap(model: Any, recorded: Path) -> float:
    """Largest difference of log-probabilities from what the policy gave."""
    tokens_BT, mask_BT, logp_BT = torch.load(recorded)
    logits_BTV = model(tokens_BT).logits[:, :-1].float()
    found_BT = torch.log_softmax(logits_BTV, -1).gather(2, tokens_BT[:, 1:, None])[..., 0]
    return float((found_BT - logp_BT[:, 1:])[mask_BT[:, 1:]].abs().max())


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
