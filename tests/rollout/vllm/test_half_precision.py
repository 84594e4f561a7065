"""Half-precision engines: other kernels pack the weights, and the same proofs hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_agreement(start: Callable[..., VllmEngine], models: dict[str, tuple[Any, str]], dtype: str) -> None:
    model = models["qwen3_tied"][0]
    engine = start("qwen3_tied", dtype)
    weights = EngineWeights(engine)
    tiny.write(weights, model)
    assert {piece.dtype for piece in weights.pieces()} == {dtype}
    (prompt,) = tiny.prompts(1)
    ((completion,),) = engine.generate([prompt], [3], Sampling(max_tokens=40, stop_token_ids=()))
    exact = copy.deepcopy(model).to(getattr(torch, dtype)).float()  # the same rounded weights, computed in float32
    assert tiny.gap(exact, prompt, completion) < (0.25 if dtype == "bfloat16" else 0.03)
