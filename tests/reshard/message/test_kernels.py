"""The Triton kernels, by Triton's own interpreter, its compiler for NVIDIA, and on a device where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; torch for CUDA brings it"
)


def run(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_kernels_equal_torch_in_the_interpreter() -> None:
    assert run("kernels_interpreted.py", "cpu", TRITON_INTERPRET="1") == "equal\n"


@needs_triton
def test_kernels_compile_for_nvidia_without_a_device(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    assert run("kernels_compiled.py", TRITON_CACHE_DIR=str(tmp_path)) == "compiled\n"


@pytest.mark.gpu
@needs_triton
def test_kernels_equal_torch_on_a_device() -> None:
    assert torch.cuda.is_available(), "-m gpu needs a CUDA device"
    assert run("kernels_interpreted.py", "cuda") == "equal\n"
