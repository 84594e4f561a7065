"""Our calls into vLLM and Megatron-core fit the types of their installed sources: `mypy --config-file tools/mypy_engines.ini`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.standins
ROOT = Path(__file__).parents[2]
WRONG = """
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from vllm.v1.engine.llm_engine import LLMEngine


def call(engine: LLMEngine, config: TransformerConfig, linear: ColumnParallelLinear) -> int:
    engine.abort_request(["one"], internals=True)
    linear.forward(weights=None)
    return config.layernorm_epsilon
"""
FOUND = (
    'Unexpected keyword argument "internals" for "abort_request" of "LLMEngine"',
    'Unexpected keyword argument "weights" for "forward" of "ColumnParallelLinear"',
    'Incompatible return value type (got "float", expected "int")',
)
"""A method of an object, a layer's forward, a field's type: none of them is a call of an imported name."""


def mypy(*files: str) -> str:
    """What it says."""
    command = [sys.executable, "-m", "mypy", "--config-file", "tools/mypy_engines.ini", "--no-error-summary", *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, check=False).stdout


def test_calls_fit_the_installed_sources() -> None:
    assert mypy() == ""


def test_wrong_calls_are_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    output = mypy(str(tmp_path / "wrong.py"))
    assert all(text in output for text in FOUND) and output.count("error:") == len(FOUND), output
