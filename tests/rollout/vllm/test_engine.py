"""How vLLM is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from tests.rollout import tiny

GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())


def test_long_prompts_go_first_and_answers_come_in_the_prompts_order(
    start: Callable[..., VllmEngine], models: dict[str, tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = models["qwen2"][0], start("qwen2")
    tiny.write(engine.weights, model)
    words, added = tiny.prompts(4)[0], []
    asked = [[*words, *words][:length] for length in (3, 9, 5, 9)]
    inner = engine._llm.add_request

    def noting(name: str, *rest: Any) -> Any:
        added.append(name.rpartition(".")[2])
        return inner(name, *rest)

    monkeypatch.setattr(engine._llm, "add_request", noting)
    found = engine.generate(asked, [0] * 4, GREEDY)
    assert added == ["1", "3", "2", "0"]
    assert [one.tokens for (one,) in found] == [tiny.greedy(model, prompt, 24) for prompt in asked]
