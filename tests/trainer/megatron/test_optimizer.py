"""The optimizer's promises on real ranks: decay groups, fp32 masters under bf16, clipping, and what is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks

SIZES = [1, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from aligner.data.column_addition import ModelShape, write_model

    folder = tmp_path_factory.mktemp("optimizer") / "model"
    write_model(folder, ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    return folder


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "whole"])
@pytest.mark.parametrize("size", SIZES)
def test_matrices_decay_and_vectors_do_not(ranks: Ranks, model: Path, size: int, distributed: bool) -> None:
    ranks(size).run("tests.trainer.megatron.optimizer_on_ranks:check_decay", model, distributed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "promise",
    ["masters_start_from_the_file", "masters_round_to_the_parameters", "clipping", "not_finite"],
)
def test_promises(ranks: Ranks, model: Path, promise: str, size: int) -> None:
    ranks(size).run(f"tests.trainer.megatron.optimizer_on_ranks:check_{promise}", model)
