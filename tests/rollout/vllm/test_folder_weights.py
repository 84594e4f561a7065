"""An engine that reads its own folder answers as transformers does with that folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny

GREEDY = Sampling(temperature=0.0, max_tokens=16, stop_token_ids=())


@pytest.mark.parametrize("family", ["qwen3_tied", "mixtral"])
def test_greedy_answers(start: Callable[..., VllmEngine], models: dict[str, tuple[Any, str]], family: str) -> None:
    (model, folder), engine = models[family], start(family)
    asked = tiny.prompts(4)
    assert read_weights(read_spec(folder), EngineWeights(engine)) > 0
    for prompt, (answer,) in zip(asked, engine.generate(asked, [0] * 4, GREEDY), strict=True):
        assert answer.tokens == tiny.greedy(model, prompt, 16)
