"""What a model can be cut into, and every refusal with the values that would work; layers dealt to stages by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.spmd.mesh import Mesh
from aligner.trainer.megatron.sizes import check_runs, check_sizes, make_stages, valid_tensor_sizes
from tests.models.tiny import save_tiny


def mesh(ranks: int, **sizes: Any) -> Mesh:
    return Mesh(tuple(range(ranks)), name="policy", **sizes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    spec = read_spec(save_tiny("qwen2", tmp_path_factory.mktemp("dense")))
    return replace(spec, layers=6, heads=12, kv_heads=6, head_dim=5)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_spec(save_tiny("mixtral", tmp_path_factory.mktemp("sparse")))


def test_tensor_sizes(dense: ModelSpec, sparse: ModelSpec) -> None:
    assert valid_tensor_sizes(dense) == [1, 2, 3, 6, 12]  # 12: two ranks share a key/value head
    assert valid_tensor_sizes(replace(dense, kv_heads=1)) == [1, 2]  # nothing else divides 14 x 5 rows
    assert valid_tensor_sizes(replace(sparse, ffn=1)) == [1, 2, 4, 8]  # no layer is dense


def test_layers_are_dealt_in_the_models_order(dense: ModelSpec) -> None:
    assert make_stages(dense, mesh(2, pipeline=2)).chunks(1) == (range(3, 6),)
    stages = make_stages(dense, mesh(3, pipeline=3, virtual_pipeline=2))
    assert [stages.chunks(stage) for stage in range(3)] == [
        (range(0, 1), range(3, 4)),
        (range(1, 2), range(4, 5)),
        (range(2, 3), range(5, 6)),
    ]
    assert stages.is_first(0, 0) and stages.is_last(2, 1)
    assert not stages.is_first(0, 1) and not stages.is_last(2, 0)
    uneven = make_stages(dense, mesh(2, pipeline=2, stage_layers=(1, 2, 1, 2), virtual_pipeline=2))
    assert [uneven.chunks(stage) for stage in range(2)] == [(range(0, 1), range(3, 4)), (range(1, 3), range(4, 6))]


@pytest.mark.parametrize(
    ("ranks", "sizes", "said"),
    [
        (4, {"tensor": 4}, "tensor=4 does not divide the 12 heads, 6 key/value heads .*use 1, 2, 3, 6 or 12"),
        (
            4,
            {"pipeline": 4},
            r"pipeline=4 does not divide the 6 layers .*use 1, 2, 3 or 6, or say .*stage_layers=\[1, 1, 2, 2\]",
        ),
        (2, {"pipeline": 2, "stage_layers": (2, 3)}, r"stage_layers=\[2, 3\] must be 2 positive .*such as \[3, 3\]"),
        (2, {"pipeline": 2, "stage_layers": (6, 0)}, "stage_layers"),
        (
            8,
            {"pipeline": 8},
            r"pipeline=8 does not divide the 6 layers .*more chunks than there are layers.*use 1, 2, 3 or 6",
        ),
        (2, {"pipeline": 2, "stage_layers": (2, 2, 2)}, "stage_layers"),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, r"in virtual_pipeline=2 chunks\); use 1 or 3, or say"),
        (1, {"virtual_pipeline": 3}, "virtual_pipeline=3 needs placement.policy.pipeline > 1"),
        (2, {"expert": 2}, "expert=2, expert_tensor=1: .* has no experts"),
    ],
)
def test_what_a_dense_model_cannot_be_cut_into(dense: ModelSpec, ranks: int, sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_sizes(dense, mesh(ranks, **sizes))


@pytest.mark.parametrize(
    ("ranks", "sizes", "said"),
    [
        (3, {"expert": 3}, "expert=3 does not divide the 4 experts .*use 1 or 2"),
        (
            10,
            {"expert": 2, "expert_tensor": 5},
            "expert_tensor=5 does not divide the width 48 .*use 1, 2, 3, 4, 6 or 8",
        ),
        (2, {"tensor": 2}, "sequence_parallel=false: .* has experts, which over tensor=2 ranks need it"),
        (2, {"expert_tensor": 2}, "expert_tensor=2 with expert=1 is not supported.*use 1, or expert > 1"),
        (4, {"expert": 2, "expert_tensor": 2}, "CPUs .gloo. do not have; use expert_tensor=1, or expert=1"),
    ],
)
def test_what_experts_cannot_run_as(sparse: ModelSpec, ranks: int, sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_runs(sparse, mesh(ranks, **sizes), sequence_parallel=False, cpu=True)


def test_what_experts_can_run_as(sparse: ModelSpec) -> None:
    check_runs(sparse, mesh(4, tensor=2, expert=2), sequence_parallel=True, cpu=True)
    check_runs(sparse, mesh(4, tensor=2, expert=2, expert_tensor=2), sequence_parallel=True, cpu=False)
    with pytest.raises(ValueError, match="its router would never learn"):
        check_runs(replace(sparse, experts_per_token=1), mesh(1), sequence_parallel=False, cpu=True)
