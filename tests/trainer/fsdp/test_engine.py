"""The two training backends agree: readouts, metrics, gradients, weights, and each goes on from what the other saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.models.tiny import save_small_weights

MODELS = ("llama", "qwen2-tied", "qwen3-moe")
CASES = ("sft", "grpo", "critic", "reward_model")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models, by name."""
    return save_small_weights(tmp_path_factory.mktemp("models"), MODELS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_megatron_on_one_rank(ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str) -> None:
    (worst,) = ranks(1).run("tests.trainer.engines_on_ranks:compare", models / model, case, tmp_path, "fsdp")
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize(
    ("model", "case", "more"),
    [
        ("llama", "sft", {}),
        ("llama", "sft", {"reshard_after_forward": True}),
        ("qwen2-tied", "grpo", {}),
        ("qwen3-moe", "grpo", {"recompute": "full", "reshard_after_forward": True}),
        ("llama", "critic", {"recompute": "selective"}),
        ("qwen2-tied", "reward_model", {}),
    ],
)
def test_agrees_with_megatron_on_two_ranks(
    ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str, more: dict[str, Any]
) -> None:
    results = ranks(2).run("tests.trainer.engines_on_ranks:compare", models / model, case, tmp_path, "fsdp", 1, more)
    assert max(max(worst.values()) for worst in results) < 1e-5, results


@pytest.mark.matrix
@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_megatron_on_four_ranks(
    ranks: Ranks, models: Path, tmp_path: Path, model: str, case: str, replicas: int
) -> None:
    results = ranks(4).run("tests.trainer.engines_on_ranks:compare", models / model, case, tmp_path, "fsdp", replicas)
    assert max(max(worst.values()) for worst in results) < 1e-5, results
