"""What ranks do in test_families.py: engines written three times, against engines that loaded the same. The world is one replica."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import aligner.rollout.vllm.engine as engine_module
from aligner.models.tensors import logical_tensors
from aligner.rollout.config import Sampling
from aligner.rollout.requests import Sample
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.layout import EngineLayout
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from tests.rollout import tiny

GREEDY = Sampling(temperature=0.0, max_tokens=8, stop_token_ids=())
DRAWN = Sampling(temperature=1.0, max_tokens=8, stop_token_ids=())
SYNCS = 3


def check(world: World, folder: Path, case: str) -> None:
    """Tokens and log-probabilities equal those of an engine that loaded the last weights from a checkpoint.

    Args:
        folder: for the checkpoint.
        case: family:dtype, and :experts for expert parallelism or :stages for two pipeline stages.
    """
    family, dtype, *cut = case.split(":")
    expert_parallel, stages = "experts" in cut, 2 if "stages" in cut else 1
    model = tiny.make_model(family, 3)
    if world.rank == 0:
        tiny.save(model, folder)
    dist.barrier()
    engine = start(folder, dtype, expert_parallel, stages)
    wanted = {name: tuple(value.shape) for name, value in tiny.tensors(model).items()}
    assert wanted == logical_tensors(engine.spec)
    refused = ["lm_head.weight"] if "lm_head.weight" not in wanted else []  # only the last stage knows
    refused += [name.replace(".experts.0.", ".experts.9.") for name in wanted if ".experts.0.up_proj." in name]
    for name in refused:
        check_refused(engine, wanted, name)
    weights = EngineWeights(engine)
    weights.pieces()
    mesh = Mesh(tuple(range(world.size)), tensor=world.size // stages, pipeline=stages)
    differs = weights.agrees(EngineLayout(engine.spec, mesh, dtype, expert_parallel).layout(world.rank))
    assert differs is None, f"{family}: {differs}"
    answers = []
    for sync in range(SYNCS):
        torch.manual_seed(10 + sync)
        tiny.randomize(model)
        tiny.write(weights, model)
        answers.append(ask(engine))
        if dtype == "float32":
            assert gap(model, answers[-1]) < 1e-4, f"{family}: {gap(model, answers[-1])}"
    assert answers[0] != answers[1] != answers[2]
    engine.close()
    if world.rank == 0:
        tiny.save(model, folder)
    dist.barrier()
    with patch.object(engine_module, "LOAD_FORMAT", "auto"):
        stock = start(folder, dtype, expert_parallel, stages)
    stock.loaded.finish()
    assert ask(stock) == answers[-1], f"{family}: differs from an engine that loaded the same weights"
    stock.close()


def check_refused(engine: VllmEngine, wanted: dict[str, tuple[int, ...]], name: str) -> None:
    """A tensor too many is an error on every rank, none of which waits for the others."""
    with pytest.raises(ValueError, match=re.escape(name)):
        EngineWeights(engine, tensors={**wanted, name: (tiny.VOCAB, 128)}).pieces()


def start(folder: Path, dtype: str, expert_parallel: bool, stages: int) -> VllmEngine:
    config = replace(tiny.CONFIG, dtype=dtype)
    ident = f"families-{os.getppid()}"
    return VllmEngine(folder, dist.group.WORLD, ident, config, torch.device("cpu"), expert_parallel, stages)


def ask(engine: VllmEngine) -> list[list[Sample]]:
    asked = tiny.prompts(4)
    return [group for how in (GREEDY, DRAWN) for group in engine.generate(asked, [7, 107, 207, 307], how)]


def gap(model: Any, answers: list[list[Sample]]) -> float:
    asked = tiny.prompts(4) * 2
    return max(tiny.gap(model, prompt, one) for prompt, (one,) in zip(asked, answers, strict=True))
