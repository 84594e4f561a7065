"""Roles on FSDP over any of a job's ranks compute what one rank of Megatron does, and go on from each other's states: fewer rows than
ranks, unequal and empty shards, replicas, the other engine's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.models.tiny import save_small_weights

MODELS = ("llama", "qwen2-tied", "qwen3-moe")


def fsdp(*ranks: int, replicas: int = 1) -> dict[str, Any]:
    return {"engine": "fsdp", "ranks": ranks, "replicas": replicas}


def megatron(*ranks: int, **sizes: int) -> dict[str, Any]:
    return {"engine": "megatron", "ranks": ranks, **sizes}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, by name."""
    return save_small_weights(tmp_path_factory.mktemp("models"), MODELS)


@pytest.mark.parametrize(
    ("model", "case", "first", "then"),
    [
        ("qwen3-moe", "grpo", fsdp(0, 2), fsdp(0, 1, 2)),  # four experts on three ranks
        ("qwen2-tied", "sft", megatron(0, 1, tensor=2), fsdp(0, 1, 2)),
        ("llama", "critic", fsdp(0, 1, 2), megatron(1, 2, pipeline=2)),  # a head of one row
    ],
    ids=str,
)
def test_goes_on_elsewhere(
    ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    run = "tests.trainer.fsdp.handover_on_ranks:check"
    for worst in ranks(3).run(run, models / model, case, tmp_path, first, then):
        assert max(worst.values()) < 1e-5, worst


@pytest.mark.matrix
@pytest.mark.parametrize("case", ["sft", "grpo", "critic", "reward_model"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (fsdp(1, 3), fsdp(0, 1, 2, 3, replicas=2)),
        (fsdp(0, 1, 2, 3, replicas=2), fsdp(0, 2, replicas=2)),
        (fsdp(0, 1, 2, 3), fsdp(3)),
        (megatron(0, 1, 2, 3, tensor=2, pipeline=2), fsdp(0, 1, 3)),
        (fsdp(1, 2, 3), megatron(0, 2, tensor=2)),
    ],
    ids=str,
)
def test_goes_on_elsewhere_on_four_ranks(
    ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    run = "tests.trainer.fsdp.handover_on_ranks:check"
    for worst in ranks(4).run(run, models / model, case, tmp_path, first, then):
        assert max(worst.values()) < 1e-5, worst
