"""What an engine gives up is really gone, and after the next transfer it answers as transformers does, as before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.sleep import residency_parts
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.memory import Meter, resident, trim
from tests.rollout import tiny

Models = dict[str, tuple[Any, str]]
GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
DRAWN = Sampling(temperature=1.0, max_tokens=24, stop_token_ids=())


def storage_bytes(engine: VllmEngine) -> tuple[int, int]:
    """(parameters, KV cache)."""
    of_weights = sum(parameter.untyped_storage().nbytes() for parameter in engine.model.parameters())
    return of_weights, sum({(s := cache.untyped_storage())._cdata: s.nbytes() for cache in engine.caches}.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_tied", "qwen3_moe", "llama_bias"])
@pytest.mark.parametrize("early", [False, True])
def test_gone_and_back(family: str, early: bool, start: Callable[..., VllmEngine], models: Models) -> None:
    model = models[family][0]
    engine = start(family)
    weights = EngineWeights(engine)
    parts = residency_parts(engine, weights, Meter(torch.device("cpu")))
    asked, seeds = tiny.prompts(6), list(range(0, 600, 100))
    if early:  # before the first transfer has found out what the engine holds
        parts["cache"].evict()
        parts["weights"].evict()
        parts["weights"].bring()
        parts["cache"].bring()
    tiny.write(weights, model)
    first = engine.generate(asked, seeds, DRAWN, 2)
    for _ in range(2):
        assert parts["cache"].bytes() == storage_bytes(engine)[1] > 0
        parts["cache"].evict()
        parts["weights"].evict()
        assert storage_bytes(engine) == (0, 0)
        with pytest.raises(RuntimeError, match="has no weights: they were given up"):
            engine.generate(asked, seeds, DRAWN, 2)
        parts["weights"].bring()
        tiny.write(weights, model)  # as a transfer: while the cache is out
        parts["cache"].bring()
        assert engine.generate(asked, seeds, DRAWN, 2) == first
    for prompt, (completion,) in zip(asked, engine.generate(asked, seeds, GREEDY), strict=True):
        assert completion.tokens == tiny.greedy(model, prompt, 24)
        assert tiny.gap(model, prompt, completion) < 1e-4


def test_the_cache_alone(start: Callable[..., VllmEngine], models: Models) -> None:
    """Its prefixes are forgotten, its weights stay; where garbage comes back instead of zeros, nothing may show."""
    model = models["qwen2"][0]
    engine = start("qwen2")
    weights = EngineWeights(engine)
    cache = residency_parts(engine, weights, Meter(torch.device("cpu")))["cache"]
    tiny.write(weights, model)
    asked = tiny.prompts(6)
    first = engine.generate(asked, [0] * 6, GREEDY)
    cache.evict()
    assert engine.loaded.complete
    cache.bring()
    assert all(not one.any() for one in engine.caches)
    assert engine.generate(asked, [0] * 6, GREEDY) == first


def test_a_kernel_that_was_given_up_cannot_multiply(start: Callable[..., VllmEngine], models: Models) -> None:
    engine = start("qwen2")
    weights = EngineWeights(engine)
    tiny.write(weights, models["qwen2"][0])
    residency_parts(engine, weights, Meter(torch.device("cpu")))["weights"].evict()
    layer: Any = engine.model.get_submodule("model.layers.0.mlp.down_proj")
    with pytest.raises(RuntimeError, match=r"mlp\.down_proj, whose weights were given up"):
        layer(torch.zeros(1, 192))


def test_packed_kernels_leave_memory(start: Callable[..., VllmEngine], models: Models) -> None:
    """A packed kernel is no tensor, so its memory is asked of the system: one of 64 MiB in the place of the others."""
    engine = start("qwen2")
    layer: Any = engine.model.get_submodule("model.layers.0.mlp.down_proj")
    parts = residency_parts(engine, EngineWeights(engine), Meter(torch.device("cpu")))
    layer.weight = torch.nn.Parameter(torch.ones(4096, 4096), requires_grad=False)
    with engine.inside():
        layer.quant_method.process_weights_after_loading(layer)
    gc.collect()
    trim()
    before = resident()[1]
    parts["weights"].evict()
    trim()
    assert before - resident()[1] > 60 << 20
