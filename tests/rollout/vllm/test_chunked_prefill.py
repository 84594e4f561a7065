"""Prompts longer than an engine step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny


@pytest.mark.matrix
def test_a_prompt_read_in_pieces_draws_the_same(models: dict[str, tuple[Any, str]], group: dist.ProcessGroup) -> None:
    """An engine step of 32 tokens reads these prompts in two or more steps, whose draws do not count."""
    model, folder = models["llama"]
    prompts = [[5 + (7 * i + j) % 90 for j in range(60)] for i in range(3)]
    sampling = Sampling(max_tokens=10, stop_token_ids=())
    found = []
    for step in (None, 32):
        config = replace(tiny.CONFIG, max_num_seqs=8, max_batched_tokens=step)
        engine = VllmEngine(folder, group, "pieces", config, torch.device("cpu"))
        try:
            tiny.write(EngineWeights(engine), model)
            found.append([one.tokens for group in engine.generate(prompts, [0, 100, 200], sampling) for one in group])
        finally:
            engine.close()
    assert found[0] == found[1]
