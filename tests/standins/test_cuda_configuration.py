"""What vLLM would choose on an H100 and a B200 for our arguments: its own configuration code, on a platform that is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aligner.models.read_spec import read_spec
from aligner.models.tensors import architecture_of
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.standins
PROGRAM = Path(__file__).with_name("cuda_configuration.py")
CASES: dict[str, dict[str, Any]] = {
    "one GPU": {},
    "one GPU, sleeps": {"sleeps": True},
    "TP4": {"tensor": 4, "sleeps": True, "suspends": True},
    "PP2": {"pipeline": 2},
    "experts": {"model": "qwen3-moe", "sleeps": True},
    "whole experts on 2": {"model": "qwen3-moe", "tensor": 2, "expert_parallel": True},
    "float32": {"dtype": "float32"},
    "FP8": {"quantization": "fp8"},
    "FP8 experts": {"model": "qwen3-moe", "quantization": "fp8"},
}
USUAL = {
    "model": "llama",
    "tensor": 1,
    "pipeline": 1,
    "expert_parallel": False,
    "sleeps": False,
    "dtype": "bfloat16",
    "quantization": "none",
    "suspends": False,
}


@pytest.fixture(scope="module", params=["h100", "b200"])
def chosen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> vLLM's choices; one process for all, since a platform is for good."""
    folders = {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in ("llama", "qwen3-moe")}
    cases = []
    for case in CASES.values():
        settings = {**USUAL, **case}
        folder = folders[settings.pop("model")]
        cases.append({**settings, "folder": str(folder), "architecture": architecture_of(read_spec(str(folder)))})
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), request.param, json.dumps(cases)], env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_is_asked_for_is_what_vllm_takes(case: str, chosen: dict[str, dict[str, Any]]) -> None:
    found, asked = chosen[case], {**USUAL, **CASES[case]}
    assert found["async_scheduling"] is False, "a step's tokens are known before the next one is scheduled"
    assert found["runner"] == (2 if asked["pipeline"] == 1 else 1)
    assert found["unsupported"] == [], "vLLM itself would have taken the first runner"
    assert found["dtype"] == f"torch.{asked['dtype']}" and found["quantization"] == (
        None if asked["quantization"] == "none" else "fp8"
    )
    assert found["logprobs"] == "processed_logprobs"
    assert (found["tensor"], found["pipeline"], found["experts"]) == (
        asked["tensor"], asked["pipeline"], asked["expert_parallel"],
    )  # fmt: skip
    assert found["block_size"] == 32 and found["prefix_caching"] and found["chunked_prefill"]
    assert found["memory_share"] == 0.8 and found["max_num_seqs"] == 256
    assert found["moe_backend"] == "triton", "its weights stay as they were written"
    assert found["executor"] == "Executor", "ours: in this process"


@pytest.mark.parametrize("case", ["FP8", "FP8 experts"])
def test_fp8_in_blocks_by_kernels_that_read_it_as_it_is_written(case: str, chosen: dict[str, dict[str, Any]]) -> None:
    found = chosen[case]
    assert found["linear_backend"] == "triton" and found["fp8"]["weight_block_size"] == [128, 128]
    assert found["fp8"]["is_checkpoint_fp8_serialized"] and found["fp8"]["activation_scheme"] == "dynamic"
    assert found["fp8_kernel"] == {"name": "TritonFp8BlockScaledMMKernel", "plain": True}
    routers = found["fp8"]["ignored_layers"]
    assert all(name.endswith(".mlp.gate") for name in routers) and bool(routers) == (case == "FP8 experts")
    assert chosen["one GPU"]["linear_backend"] == "auto" and chosen["one GPU"]["fp8"] is None


@pytest.mark.parametrize("case", CASES)
def test_graphs_and_sleep(case: str, chosen: dict[str, dict[str, Any]]) -> None:
    found, asked = chosen[case], {**USUAL, **CASES[case]}
    assert found["compiled"] == "VLLM_COMPILE", "so the cache of compiled code matters"
    assert found["cudagraphs"] == "FULL_AND_PIECEWISE"
    assert found["sleep"] is asked["sleeps"]
    assert found["communicators_leave"] is asked["suspends"]
    assert found["graphs_leave"] is asked["sleeps"], "CUDA graphs of an engine that sleeps can leave the device"
