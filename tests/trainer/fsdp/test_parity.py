"""Families that only transformers knows, packed and sharded, against transformers itself row by row; exports are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligner.models.read_spec import read_spec
from aligner.spmd.mesh import Mesh
from aligner.trainer.config import PolicyConfig
from aligner.trainer.fsdp.checks import check_runs
from tests.conftest import Ranks
from tests.trainer.fsdp.families import FAMILIES, save_model

CHEAP = ("gemma2", "gpt_oss", "gpt_neox", "minicpm3", "gemma3n_text")
"""Soft-capping and windows; sinks, fused experts, biases; other names, norms with a bias, parallel residuals; and see FAMILIES."""


@pytest.mark.parametrize("family", CHEAP)
def test_agrees_with_transformers(ranks: Ranks, tmp_path: Path, family: str) -> None:
    save_model(family, tmp_path / "model")
    (worst,) = ranks(1).run("tests.trainer.fsdp.parity_on_ranks:check", tmp_path / "model", tmp_path)
    assert worst["logprobs"] < 1e-5 and worst["gradients"] < 1e-4, worst


@pytest.mark.parametrize(("family", "more"), [("gpt_oss", {}), ("deepseek_v3", {"recompute": "full"})])
def test_agrees_with_transformers_on_two_ranks(ranks: Ranks, tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    save_model(family, tmp_path / "model")
    for worst in ranks(2).run("tests.trainer.fsdp.parity_on_ranks:check", tmp_path / "model", tmp_path, 1, more):
        assert worst["logprobs"] < 1e-5 and worst["gradients"] < 1e-4, worst


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_class_does_not_train_stays(ranks: Ranks, tmp_path: Path, size: int) -> None:
    save_model("ernie4_5_moe", tmp_path / "model")
    for untrained in ranks(size).run(
        "tests.trainer.fsdp.parity_on_ranks:check_untrained", tmp_path / "model", tmp_path
    ):
        assert untrained == [f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias" for layer in (1, 2)]


def test_parameters_that_a_class_keeps_in_float32_are_refused_in_bfloat16(tmp_path: Path) -> None:
    """A rollout has them in float32, and would choose other experts."""
    save_model("ernie4_5_moe", tmp_path)
    spec, mesh = read_spec(tmp_path), Mesh((0,), name="policy")
    check_runs(spec, mesh, PolicyConfig(engine="fsdp"), False, True)
    with pytest.raises(ValueError, match=r"policy\.dtype=bfloat16: .*keeps .*mlp\.gate.* in float32.*use float32"):
        check_runs(spec, mesh, PolicyConfig(engine="fsdp", dtype="bfloat16"), False, True)


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_keeps_float32_masters(ranks: Ranks, tmp_path: Path, size: int) -> None:
    save_model("qwen2_moe", tmp_path / "model")
    more = {"dtype": "bfloat16"}
    for worst in ranks(size).run("tests.trainer.fsdp.parity_on_ranks:check", tmp_path / "model", tmp_path, 1, more):
        assert 1e-4 < worst["logprobs"] < 0.2, (
            "computed in bfloat16; the export is that of the masters, to the last bit"
        )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmo3"])
def test_a_frozen_model_in_bfloat16_computes_the_same(ranks: Ranks, tmp_path: Path, family: str, size: int) -> None:
    save_model(family, tmp_path / "model")
    ranks(size).run("tests.trainer.fsdp.parity_on_ranks:check_frozen", tmp_path / "model")


@pytest.mark.matrix
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_transformers(
    ranks: Ranks, tmp_path: Path, family: str, size: int, recompute: str
) -> None:
    save_model(family, tmp_path / "model")
    replicas, more = (2 if size == 4 else 1), {"recompute": recompute}
    for worst in ranks(size).run(
        "tests.trainer.fsdp.parity_on_ranks:check", tmp_path / "model", tmp_path, replicas, more
    ):
        assert worst["logprobs"] < 1e-5 and worst["gradients"] < 1e-4, worst
