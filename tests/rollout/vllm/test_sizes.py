"""What vLLM can run: each impossible size is named, together with the values that would work."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from aligner.rollout.config import RolloutConfig
from aligner.rollout.vllm.sizes import check_runs, kv_cache_bytes

# 4 layers, 8 heads, 2 key-value heads of 64: in float32 a token's cache is 2 * 4 * 2 * 64 * 4 = 4096 bytes.
SPEC: Any = SimpleNamespace(
    family="qwen3", path="/models/x", layers=4, heads=8, kv_heads=2, head_dim=64, hidden=512, ffn=24, vocab=100,
    max_positions=4096, tensors=None, o_bias=False, experts=0, expert_ffn=0, sparse_layers=(),
    positions_text="4096 positions of the model in /models/x",
)  # fmt: skip
# 6 experts of width 20 in layers 1 and 3.
MOE: Any = SimpleNamespace(**{**vars(SPEC), "experts": 6, "expert_ffn": 20, "sparse_layers": (1, 3)})


def test_tensor_parallel_sizes() -> None:
    config = RolloutConfig()
    for tensor in (1, 2, 4, 8):  # beyond 2, each rank has a copy of one key-value head
        check_runs(config, SPEC, tensor, cpu=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.tensor=3 does not divide .*; use 1, 2, 4, 8\."):
        check_runs(config, SPEC, 3, cpu=True)


def test_a_family_whose_key_value_heads_the_engine_does_not_copy() -> None:
    norms: Any = SimpleNamespace(**{**vars(SPEC), "family": "olmo2"})
    for tensor in (1, 2):
        check_runs(RolloutConfig(), norms, tensor, cpu=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.tensor=4 does not divide .*; use 1, 2\."):
        check_runs(RolloutConfig(), norms, 4, cpu=True)


def test_sizes_for_experts() -> None:
    config = RolloutConfig()
    for tensor in (1, 2, 4):
        check_runs(config, MOE, tensor, cpu=True, expert_parallel=True)
    narrow: Any = SimpleNamespace(**{**vars(MOE), "expert_ffn": 18})
    with pytest.raises(ValueError, match=r"tensor=4 does not divide .* MLP width 24, expert width 18 .*; use 1, 2\."):
        check_runs(config, narrow, 4, cpu=True)
    check_runs(config, narrow, 4, cpu=True, expert_parallel=True)
    with pytest.raises(ValueError, match=r"tensor=8 is more than the 6 experts .*; use 1, 2, 4\."):
        check_runs(config, MOE, 8, cpu=True, expert_parallel=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.expert=2: the model in /models/x has no experts; use 1"):
        check_runs(config, SPEC, 2, cpu=True, expert_parallel=True)
    odd: Any = SimpleNamespace(**{**vars(MOE), "hidden": 500})
    check_runs(config, odd, 1, cpu=False)
    with pytest.raises(ValueError, match="no CPU kernel for experts of a hidden size of 500"):
        check_runs(config, odd, 1, cpu=True)


def test_pipeline_stages() -> None:
    config = RolloutConfig()
    for pipeline in (1, 2, 4):
        check_runs(config, SPEC, 1, cpu=True, pipeline=pipeline)
    with pytest.raises(ValueError, match=r"pipeline=3 does not divide the 4 layers .*; use 1, 2, 4\."):
        check_runs(config, SPEC, 1, cpu=True, pipeline=3)
    check_runs(config, MOE, 1, cpu=True, pipeline=2)
    with pytest.raises(ValueError, match=r"experts in every stage .* sparse layers are \[1, 3\]; use fewer stages"):
        check_runs(config, MOE, 1, cpu=True, pipeline=4)


def test_a_bias_that_the_engine_would_drop() -> None:
    biased = {**vars(SPEC), "o_bias": True}
    check_runs(RolloutConfig(), SimpleNamespace(**{**biased, "family": "llama"}), 1, cpu=True)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"ignores the bias of a qwen3 model's attention output; .* attention_bias=false"
    ):
        check_runs(RolloutConfig(), SimpleNamespace(**biased), 1, cpu=True)  # type: ignore[arg-type]


def test_head_sizes_without_a_cpu_kernel() -> None:
    narrow: Any = SimpleNamespace(**{**vars(SPEC), "head_dim": 16})
    check_runs(RolloutConfig(), narrow, 1, cpu=False)
    with pytest.raises(ValueError, match="no CPU attention for head_dim=16"):
        check_runs(RolloutConfig(), narrow, 1, cpu=True)


def test_kv_cache_sizes() -> None:
    one = 33 * 32 * 4096
    config = RolloutConfig()
    assert kv_cache_bytes(config, SPEC, 1, cpu=False) is None
    assert kv_cache_bytes(config, SPEC, 1, cpu=True) == 128 * one
    assert kv_cache_bytes(config, SPEC, 8, cpu=True) == 128 * one // 2  # 1 key-value head of 2
    assert kv_cache_bytes(config, SPEC, 1, cpu=True, pipeline=2) == 128 * one // 2  # 2 of 4 layers
    assert kv_cache_bytes(replace(config, dtype="bfloat16"), SPEC, 1, cpu=True) == 128 * one // 2
    assert kv_cache_bytes(replace(config, max_num_seqs=4096), SPEC, 1, cpu=True) == 1024 << 20
    assert kv_cache_bytes(replace(config, kv_cache_mib=7), SPEC, 1, cpu=False) == 7 << 20


def test_a_cache_that_is_too_small() -> None:
    """1024 tokens are 32 blocks, and one stays empty: 33 * 32 * 4096 bytes = 4.125 MiB."""
    message = r"rollout\.kv_cache_mib=4 cannot hold one sample .* use rollout\.kv_cache_mib=5 or more"
    with pytest.raises(ValueError, match=message):
        check_runs(RolloutConfig(kv_cache_mib=4), SPEC, 1, cpu=True)
