"""A model that leaves between any two calls and comes back trains as one that stays, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Ranks

LAYOUTS = [(1, 1), (2, 1), (2, 2)]
"""(ranks, tensor-parallel size)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from aligner.data.column_addition import ModelShape, write_model

    folder = tmp_path_factory.mktemp("offload") / "model"
    write_model(folder, ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    return folder


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "whole"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "tensor"), LAYOUTS)
def test_training_goes_on_bit_for_bit(
    ranks: Ranks, model: Path, size: int, tensor: int, dtype: str, distributed: bool
) -> None:
    ranks(size).run("tests.trainer.offload_on_ranks:check_training", model, tensor, dtype, distributed)


@pytest.mark.parametrize(("size", "tensor"), LAYOUTS)
def test_what_has_not_changed_is_not_copied_again(ranks: Ranks, model: Path, size: int, tensor: int) -> None:
    ranks(size).run("tests.trainer.offload_on_ranks:check_copies", model, tensor)


@pytest.mark.parametrize("size", [1, 2])
def test_an_optimizer_that_is_made_in_the_first_update(ranks: Ranks, model: Path, size: int) -> None:
    ranks(size).run("tests.trainer.offload_on_ranks:check_late_optimizer", model)
