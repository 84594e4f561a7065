"""Gradients that are reduced while the backward computes are those that are reduced after it: weights and losses to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.models.tiny import save_tiny

ON_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "data": ("llama", {}),
    "data, whole optimizer": ("llama", {"distributed": False}),
    "data, tied, bfloat16": ("qwen2-tied", {"dtype": "bfloat16", "recompute": "full"}),
    "context": ("llama", {"context": 2}),
    "experts": ("qwen3-moe", {"expert": 2}),
    "experts on both": ("qwen3-moe", {"experts": "grouped"}),
}
ON_FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "pipeline, tied": ("qwen2-tied", {"pipeline": 2}),
    "virtual pipeline": ("llama", {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor": ("llama", {"tensor": 2}),
    "experts": ("qwen3-moe", {"expert": 2, "recompute": "mlp"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama", "qwen2-tied", "qwen3-moe")}
    for name, folder in folders.items():
        save_tiny(name, folder)
    return folders


def check(ranks: Ranks, models: dict[str, Path], size: int, case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    function = "tests.trainer.megatron.reduction_on_ranks:check_same_numbers"
    for seen in ranks(size).run(function, models[name], settings, seconds=240):
        ((buckets, under_way),) = seen
        assert under_way == buckets > 0, "all were sent before the backward had ended"


@pytest.mark.parametrize("case", ON_TWO)
def test_on_two_ranks(ranks: Ranks, models: dict[str, Path], case: str) -> None:
    check(ranks, models, 2, ON_TWO[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR)
def test_on_four_ranks(ranks: Ranks, models: dict[str, Path], case: str) -> None:
    check(ranks, models, 4, ON_FOUR[case])
