"""One world of one rank for the rollout's tests, and an engine for each model family, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.models.read_spec import read_spec
from aligner.reshard.weights import WritableWeights
from aligner.rollout.config import ENGINES
from aligner.rollout.engine import RolloutEngine
from aligner.rollout.engines import backend
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.vllm.engine import VllmEngine
from aligner.spmd.mesh import Mesh
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
def start(models: dict[str, tuple[Any, str]], group: dist.ProcessGroup) -> Iterator[Callable[..., VllmEngine]]:
    """Starts an engine without weights; it is closed after the test."""
    engines: list[VllmEngine] = []

    def make(family: str, dtype: str = "float32") -> VllmEngine:
        config = replace(tiny.CONFIG, dtype=dtype)
        engines.append(VllmEngine(models[family][1], group, "test", config, torch.device("cpu")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(
    scope="module", params=[(engine, family) for engine in ENGINES for family in tiny.FAMILIES], ids="-".join
)
def loaded(
    request: pytest.FixtureRequest, models: dict[str, tuple[Any, str]], group: dist.ProcessGroup
) -> Iterator[tuple[Any, RolloutEngine, WritableWeights]]:
    """(transformers model, engine, its weights as last written), of every kind of engine."""
    kind, family = request.param
    model, folder = models[family]
    spec, config, device = read_spec(folder), tiny.config(kind), torch.device("cpu")
    build, mesh = backend(kind).engine_type().build, Mesh((0,), 1, 1)
    layout, loaded = backend(kind).layout(spec, mesh, config), LoadedWeights()
    engine = build(spec, mesh, group, "test", config, device, layout=layout, sleeps=True, loaded=loaded)
    tiny.write(engine.weights, model)
    yield model, engine, engine.weights
    engine.close()
