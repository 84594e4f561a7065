"""The rollout's settings: each impossible value is named, together with the values that would work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from aligner.bounds import check_settings
from aligner.rollout.config import RolloutConfig, Sampling, StreamConfig

# 4 layers, 8 heads, 2 key-value heads of 64: in float32 a token's cache is 2 * 4 * 2 * 64 * 4 = 4096 bytes.
SPEC: Any = SimpleNamespace(
    family="qwen3", path="/models/x", layers=4, heads=8, kv_heads=2, head_dim=64, hidden=512, ffn=24, vocab=100,
    max_positions=4096, o_bias=False, experts=0, expert_ffn=0, sparse_layers=(),
    positions_text="4096 positions of the model in /models/x",
)  # fmt: skip
# 6 experts of width 20 in layers 1 and 3.
MOE: Any = SimpleNamespace(**{**vars(SPEC), "experts": 6, "expert_ffn": 20, "sparse_layers": (1, 3)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "fp8"}, "rollout.dtype=fp8 is unknown; use float32, bfloat16"),
        ({"max_model_len": 1}, "rollout.max_model_len=1 must be at least 2 .room for a response., or null"),
        ({"max_num_seqs": 0}, "rollout.max_num_seqs=0 must be at least 1"),
        (
            {"max_batched_tokens": 100},
            "rollout.max_batched_tokens=100 is below rollout.max_num_seqs: .* use 128 or more",
        ),
        ({"kv_cache_mib": 0}, "rollout.kv_cache_mib=0 must be at least 1, or null"),
        ({"gpu_memory_utilization": 1.2}, "rollout.gpu_memory_utilization=1.2 must be more than 0 and at most 1"),
        ({"max_model_len": 4097}, "rollout.max_model_len=4097 is beyond the 4096 positions of the model in /models/x"),
        # 1024 tokens are 32 blocks, and one stays empty: 33 * 32 * 4096 bytes = 4.125 MiB.
        ({"kv_cache_mib": 4}, "rollout.kv_cache_mib=4 cannot hold one sample .* use rollout.kv_cache_mib=5 or more"),
    ],
)
def test_impossible_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RolloutConfig(), **changed).check_model(SPEC, 1, cpu=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature=-1.0 must be between 0 and 2"),
        ({"temperature": float("nan")}, "sampling.temperature=nan must be between 0 and 2"),
        ({"temperature": 0.001}, "use 0 .greedy. or 0.01 to 2"),
        ({"max_tokens": 0}, "sampling.max_tokens=0 must be at least 1"),
        ({"top_p": 1.5}, "sampling.top_p=1.5 must be more than 0 and at most 1"),
        ({"top_k": -1}, "sampling.top_k=-1 must be at least 0 .0: all tokens."),
        ({"stop_token_ids": (3, -1)}, r"each item of sampling.stop_token_ids=\[3, -1\] must be at least 0"),
    ],
)
def test_impossible_sampling(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(Sampling(**changed), "sampling")


def test_tensor_parallel_sizes() -> None:
    config = RolloutConfig()
    for tensor in (1, 2, 4, 8):  # beyond 2, each rank has a copy of one key-value head
        config.check_model(SPEC, tensor, cpu=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.tensor=3 does not divide .*; use 1, 2, 4, 8\."):
        config.check_model(SPEC, 3, cpu=True)


def test_a_family_whose_key_value_heads_the_engine_does_not_copy() -> None:
    norms: Any = SimpleNamespace(**{**vars(SPEC), "family": "olmo2"})
    for tensor in (1, 2):
        RolloutConfig().check_model(norms, tensor, cpu=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.tensor=4 does not divide .*; use 1, 2\."):
        RolloutConfig().check_model(norms, 4, cpu=True)


def test_sizes_for_experts() -> None:
    config = RolloutConfig()
    for tensor in (1, 2, 4):
        config.check_model(MOE, tensor, cpu=True, expert_parallel=True)
    narrow: Any = SimpleNamespace(**{**vars(MOE), "expert_ffn": 18})
    with pytest.raises(ValueError, match=r"tensor=4 does not divide .* MLP width 24, expert width 18 .*; use 1, 2\."):
        config.check_model(narrow, 4, cpu=True)
    config.check_model(narrow, 4, cpu=True, expert_parallel=True)
    with pytest.raises(ValueError, match=r"tensor=8 is more than the 6 experts .*; use 1, 2, 4\."):
        config.check_model(MOE, 8, cpu=True, expert_parallel=True)
    with pytest.raises(ValueError, match=r"placement\.rollout\.expert=2: the model in /models/x has no experts; use 1"):
        config.check_model(SPEC, 2, cpu=True, expert_parallel=True)
    odd: Any = SimpleNamespace(**{**vars(MOE), "hidden": 500})
    config.check_model(odd, 1, cpu=False)
    with pytest.raises(ValueError, match="no CPU kernel for experts of a hidden size of 500"):
        config.check_model(odd, 1, cpu=True)


def test_pipeline_stages() -> None:
    config = RolloutConfig()
    for pipeline in (1, 2, 4):
        config.check_model(SPEC, 1, cpu=True, pipeline=pipeline)
    with pytest.raises(ValueError, match=r"pipeline=3 does not divide the 4 layers .*; use 1, 2, 4\."):
        config.check_model(SPEC, 1, cpu=True, pipeline=3)
    config.check_model(MOE, 1, cpu=True, pipeline=2)
    with pytest.raises(ValueError, match=r"experts in every stage .* sparse layers are \[1, 3\]; use fewer stages"):
        config.check_model(MOE, 1, cpu=True, pipeline=4)


def test_a_bias_that_the_engine_would_drop() -> None:
    biased = {**vars(SPEC), "o_bias": True}
    RolloutConfig().check_model(SimpleNamespace(**{**biased, "family": "llama"}), 1, cpu=True)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"ignores the bias of a qwen3 model's attention output; .* attention_bias=false"
    ):
        RolloutConfig().check_model(SimpleNamespace(**biased), 1, cpu=True)  # type: ignore[arg-type]


def test_head_sizes_without_a_cpu_kernel() -> None:
    narrow: Any = SimpleNamespace(**{**vars(SPEC), "head_dim": 16})
    RolloutConfig().check_model(narrow, 1, cpu=False)
    with pytest.raises(ValueError, match="no CPU attention for head_dim=16"):
        RolloutConfig().check_model(narrow, 1, cpu=True)


def test_kv_cache_sizes() -> None:
    one = 33 * 32 * 4096
    config = RolloutConfig()
    assert config.kv_cache_bytes(SPEC, 1, cpu=False) is None
    assert config.kv_cache_bytes(SPEC, 1, cpu=True) == 128 * one
    assert config.kv_cache_bytes(SPEC, 8, cpu=True) == 128 * one // 2  # 1 key-value head of 2
    assert config.kv_cache_bytes(SPEC, 1, cpu=True, pipeline=2) == 128 * one // 2  # 2 of 4 layers
    assert replace(config, dtype="bfloat16").kv_cache_bytes(SPEC, 1, cpu=True) == 128 * one // 2
    assert replace(config, max_num_seqs=4096).kv_cache_bytes(SPEC, 1, cpu=True) == 1024 << 20
    assert replace(config, kv_cache_mib=7).kv_cache_bytes(SPEC, 1, cpu=False) == 7 << 20


def test_settings_load_neither_torch_nor_vllm() -> None:
    code = "import sys, aligner.rollout.config; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (StreamConfig(lag=-1), r"stream.lag=-1 must be at least 0 \(0: on-policy\)"),
        (StreamConfig(in_flight=True), "stream.in_flight=true .* set stream.lag=1 or more"),
        (StreamConfig(lag=1, step_tokens=0), "stream.step_tokens=0 must be at least 1, or null"),
    ],
)
def test_an_impossible_stream_is_named(stream: StreamConfig, message: str) -> None:
    check_settings(StreamConfig(lag=2, in_flight=True, step_tokens=64), "stream")
    with pytest.raises(ValueError, match=message):
        check_settings(stream, "stream")
