"""One world of one rank for the rollout's tests, and an engine for each model family, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.rollout.engine import RolloutEngine
from aligner.rollout.weights import EngineWeights
from tests.rollout import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """family -> (transformers model, its folder)."""
    root: Path = tmp_path_factory.mktemp("models")
    made = {family: tiny.make_model(family, seed) for seed, family in enumerate((*tiny.FAMILIES, *tiny.MORE_FAMILIES))}
    return {family: (model, tiny.save(model, root / family)) for family, model in made.items()}


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


@pytest.fixture
def start(models: dict[str, tuple[Any, str]], group: dist.ProcessGroup) -> Iterator[Callable[..., RolloutEngine]]:
    """Starts an engine without weights; it is closed after the test."""
    engines: list[RolloutEngine] = []

    def make(family: str, dtype: str = "float32") -> RolloutEngine:
        config = replace(tiny.CONFIG, dtype=dtype)
        engines.append(RolloutEngine(models[family][1], group, "test", config, torch.device("cpu")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def loaded(
    request: pytest.FixtureRequest, models: dict[str, tuple[Any, str]], group: dist.ProcessGroup
) -> Iterator[tuple[Any, RolloutEngine, EngineWeights]]:
    """(transformers model, engine, its weights as last written)."""
    model, folder = models[request.param]
    engine = RolloutEngine(folder, group, "test", tiny.CONFIG, torch.device("cpu"))
    weights = EngineWeights(engine)
    tiny.write(weights, model)
    yield model, engine, weights
    engine.close()
