"""The rollout's settings: each impossible value is named, together with the values that would work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from aligner.bounds import check_settings
from aligner.config.schema import compose_config, to_config
from aligner.rollout.config import RolloutConfig, Sampling, StreamConfig

SPEC: Any = SimpleNamespace(max_positions=4096, positions_text="4096 positions of the model in /models/x")


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
        ({"engine": "sglang"}, "rollout.engine=sglang is unknown; use vllm, transformers"),
    ],
)
def test_impossible_settings(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RolloutConfig(), **changed).check_length(SPEC)


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


def test_the_engine_is_one_setting() -> None:
    rollout = to_config(compose_config(["rollout.engine=transformers", "model.path=x"], "quickstart")).rollout
    assert rollout.engine == "transformers"
    check_settings(rollout, "rollout")


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
