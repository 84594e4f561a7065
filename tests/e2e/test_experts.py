"""A mixture of experts through the whole job: the same samples, rewards, losses and gradients under any layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Task


@pytest.fixture(scope="module")
def model(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's model with four experts in each layer, random and large enough to answer prompts differently."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(task.folder / "model", folder)
    dense = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = Qwen3MoeConfig(
        **{key: dense[key] for key in (*kept, "max_position_embeddings", "eos_token_id", "bos_token_id")},
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 5.0)
    made.save_pretrained(folder)
    return folder


@pytest.mark.matrix
def test_layouts_of_experts_agree(job: Callable[..., list[dict[str, Any]]], model: Path) -> None:
    common = (f"model.path={model}", "train.steps=3")
    whole = job(2, *common)
    engines = ("placement.rollout.tensor=2", "placement.rollout.expert=2")
    for sizes in (
        ("placement.policy.expert=2", *engines),
        ("placement.policy.tensor=2", "placement.policy.sequence_parallel=true"),
    ):
        rows = job(2, *common, *sizes)
        for row, expected in zip(rows, whole, strict=True):
            assert row["reward"] == expected["reward"] and row["length"] == expected["length"]
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            assert row["gap_max"] < 1e-4
            assert row["reshard_moved_bytes"] == row["reshard_minimum_bytes"]
    assert len({row["reward"] for row in whole}) == 3


@pytest.mark.matrix
def test_a_checkpoint_of_experts_goes_on_under_another_layout(
    model: Path, task: Task, tmp_path: Path, torchrun: Callable[..., Any]
) -> None:
    """Expert parallel and distributed over the data shards; then tensor parallel, and once more as before."""
    common = [
        f"model.path={model}",
        "train.steps=5",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "policy.optimizer.lr=1e-3",
    ]
    common += ["checkpoint.accept_changes=true"]
    layouts = {
        "experts": ["placement.policy.expert=2", "policy.optimizer.distributed=true", "policy.dtype=float32"],
        "again": ["placement.policy.expert=2", "policy.optimizer.distributed=true", "policy.dtype=float32"],
        "tensor": ["placement.policy.tensor=2", "placement.policy.sequence_parallel=true"],
        "data": [],
    }
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for name, sizes in layouts.items():
        run = tmp_path / name
        if rows:
            shutil.copytree(
                tmp_path / "experts" / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002"
            )
        done = torchrun(2, ["-m", "aligner.main", *task.overrides(run), *common, *sizes])
        assert done.returncode == 0, done.stderr[-3000:]
        rows[name] = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for name in ("again", "tensor", "data"):
        assert sorted(rows[name]) == [3, 4, 5]
        for step, row in rows[name].items():
            expected = rows["experts"][step]
            exact = {"rel": 0, "abs": 0} if name == "again" else {"rel": 1e-5, "abs": 1e-6}
            for key in ("reward", "length", "loss", "grad_norm", "entropy"):
                assert row[key] == pytest.approx(expected[key], **exact), (name, step, key)
    last = "checkpoints/step-00000005"
    for file in (tmp_path / "experts" / last).glob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "again" / last / file.name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert any("experts" in key for key in one)
