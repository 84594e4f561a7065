"""The engines' layout without engines: numbers worked by hand (real engines: families.py), and what it costs."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.tensors import logical_tensors
from aligner.rollout.vllm.layout import EngineLayout
from aligner.spmd.mesh import Mesh
from tests.families import ROWS

Models = dict[str, tuple[Any, str]]
MOE = "model.layers.1.mlp.experts"


@pytest.fixture
def moe(models: Models) -> ModelSpec:
    """Hidden 128, 4 heads and 2 key-value heads of 32, vocabulary 100, 5 experts of width 80 in layer 1."""
    return read_spec(models["qwen3_moe"][1])


def side(spec: ModelSpec, ranks: int, tensor: int, expert_parallel: bool = False, pipeline: int = 1) -> EngineLayout:
    mesh = Mesh(tuple(range(10, 10 + ranks)), tensor=tensor, pipeline=pipeline, name="rollout")
    return EngineLayout(spec, mesh, "bfloat16", expert_parallel)


def boxes(found: EngineLayout, name: str) -> list[tuple[str, str, int, tuple[int, ...], tuple[int, ...]]]:
    return [(str(p.box), p.storage, p.offset, p.stride, ranks) for p, ranks in found.holders(name)]


def test_key_value_heads_are_shared_beyond_their_number(moe: ModelSpec) -> None:
    found, qkv = side(moe, 8, 4), "model.layers.0.self_attn.qkv_proj:weight"
    # Two replicas (10-13, 14-17). A rank has one query head of 32 rows, then its key, then its value head.
    assert boxes(found, "model.layers.0.self_attn.v_proj.weight") == [
        ("[0:32, 0:128]", qkv, 64 * 128, (128, 1), (10, 11, 14, 15)),
        ("[32:64, 0:128]", qkv, 64 * 128, (128, 1), (12, 13, 16, 17)),
    ]
    assert boxes(found, "model.layers.0.self_attn.q_proj.weight")[3] == (
        "[96:128, 0:128]", qkv, 0, (128, 1), (13, 17),
    )  # fmt: skip


def test_vocabulary_is_rounded_up_before_it_is_cut(moe: ModelSpec) -> None:
    # 100 rows become 128, 32 for each rank: the last holds 4 of the checkpoint's.
    found = boxes(side(moe, 4, 4), "lm_head.weight")
    assert [(box, ranks) for box, *_, ranks in found] == [
        ("[0:32, 0:128]", (10,)), ("[32:64, 0:128]", (11,)), ("[64:96, 0:128]", (12,)), ("[96:100, 0:128]", (13,)),
    ]  # fmt: skip
    # 64 rows of 33 are the first rank's already.
    assert boxes(side(replace(moe, vocab=33), 2, 2), "lm_head.weight") == [
        ("[0:32, 0:128]", "lm_head:weight", 0, (128, 1), (10,)),
        ("[32:33, 0:128]", "lm_head:weight", 0, (128, 1), (11,)),
    ]
    assert len(boxes(side(replace(moe, vocab=30), 2, 2), "lm_head.weight")) == 1


def test_a_part_of_every_expert(moe: ModelSpec) -> None:
    # w13 is experts x 80 x 128 on each of two ranks: 40 rows of the gate above 40 of the up projection.
    assert boxes(side(moe, 2, 2), f"{MOE}.3.up_proj.weight") == [
        (f"[{low}:{low + 40}, 0:128]", f"{MOE}.routed_experts:w13_weight", (3 * 80 + 40) * 128, (128, 1), (10 + rank,))
        for rank, low in enumerate((0, 40))
    ]
    assert boxes(side(moe, 2, 2), f"{MOE}.3.down_proj.weight")[1] == (
        "[0:128, 40:80]", f"{MOE}.routed_experts:w2_weight", 3 * 128 * 40, (40, 1), (11,),
    )  # fmt: skip


def test_whole_experts(moe: ModelSpec) -> None:
    # 5 experts on two ranks: 0, 1, 2 and 3, 4. Two replicas.
    found = side(moe, 4, 2, expert_parallel=True)
    assert [found.holders(f"{MOE}.{expert}.gate_proj.weight")[0][1] for expert in range(5)] == [
        (10, 12), (10, 12), (10, 12), (11, 13), (11, 13),
    ]  # fmt: skip
    assert boxes(found, f"{MOE}.4.gate_proj.weight") == [
        ("[0:80, 0:128]", f"{MOE}.routed_experts:w13_weight", 160 * 128, (128, 1), (11, 13))
    ]


def test_pipeline_stages(models: Models, moe: ModelSpec) -> None:
    tied = side(read_spec(models["qwen3_tied"][1]), 8, 2, pipeline=2)
    # Stage 0 is ranks 10-13, two replicas of two; both ends hold the tied embedding.
    assert [ranks for _, ranks in tied.holders("model.embed_tokens.weight")] == [(10, 12, 14, 16), (11, 13, 15, 17)]
    assert [ranks for _, ranks in tied.holders("model.norm.weight")] == [(14, 15, 16, 17)]
    assert [ranks for _, ranks in tied.holders("model.layers.1.mlp.up_proj.weight")] == [(14, 16), (15, 17)]
    everywhere = side(replace(moe, layer_types=("sparse",) * 2), 2, 1, pipeline=2)
    assert [ranks for _, ranks in everywhere.holders("lm_head.weight")] == [(10, 11)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_tied", "qwen3_moe", "mixtral", "gemma", "llama_bias", *ROWS])
@pytest.mark.parametrize(("tensor", "pipeline", "experts"), [(1, 1, False), (2, 2, False), (4, 1, False), (2, 1, True)])
def test_by_rank_and_by_tensor_agree(models: Models, family: str, tensor: int, pipeline: int, experts: bool) -> None:
    spec = read_spec(models[family][1])
    found = side(spec, 8, tensor, experts and bool(spec.experts), pipeline)
    by_tensor = {
        (piece, rank) for name in logical_tensors(spec) for piece, ranks in found.holders(name) for rank in ranks
    }
    by_rank = [(piece, rank) for rank in found.ranks for piece in found.layout(rank)]
    assert len(by_rank) == len(set(by_rank))
    assert set(by_rank) == by_tensor
    for name, shape in logical_tensors(spec).items():  # every element is somewhere in each replica
        covered = {piece.box for piece, _ in found.holders(name)}
        size = 1
        for extent in shape:
            size *= extent
        assert sum(box.elements for box in covered) == size, name


def test_tensors_and_ranks_that_are_not_there(moe: ModelSpec) -> None:
    found = side(moe, 2, 2)
    for name in ("lm_head.bias", "model.layers.2.mlp.gate.weight", f"{MOE}.5.up_proj.weight", "model.layers.x.y"):
        assert found.holders(name) == []
    assert found.layout(9) == []


def test_a_thousand_ranks_and_47000_tensors_take_a_moment(moe: ModelSpec) -> None:
    large = replace(
        moe,
        layers=122,
        layer_types=("sparse",) * 122,
        experts=128,
        hidden=4096,
        expert_ffn=1536,
        heads=64,
        kv_heads=4,
    )
    names = list(logical_tensors(large))
    assert len(names) > 47_000
    start = time.process_time()
    found = side(large, 1024, 8)
    assert sum(len(found.holders(name)) for name in names) > 8 * 47_000
    assert len(found.layout(500)) == len(names)
    assert time.process_time() - start < 5  # 0.7 s where this was written


def test_the_layout_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, aligner.rollout.vllm.layout; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30, cwd=root).returncode == 0
