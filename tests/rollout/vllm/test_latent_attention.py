"""Latent attention (DeepSeek): what vLLM derives from the weights that are written follows every transfer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import aligner.rollout.vllm.engine as engine_module
from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.sleep import residency_parts
from aligner.spmd.memory import Meter
from tests.rollout import tiny
from tools.family_models import write_model

CPU = torch.device("cpu")


def test_a_synced_engine_is_a_fresh_one(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_model("deepseek_v3", folder, seed)
    config = replace(tiny.CONFIG, max_num_seqs=8)
    monkeypatch.setattr(engine_module, "LOAD_FORMAT", "auto")
    fresh = VllmEngine(folders[1], group, f"fresh{os.getpid()}", config, CPU)
    fresh.loaded.finish()
    expected = tiny.ask(fresh)
    fresh.close()
    monkeypatch.setattr(engine_module, "LOAD_FORMAT", "dummy")
    engine = VllmEngine(folders[0], group, f"synced{os.getpid()}", config, CPU)
    answers = []
    for folder in folders:
        read_weights(read_spec(folder), engine.weights)
        answers.append(tiny.ask(engine))
    assert answers[1] == expected != answers[0]
    parts = residency_parts(engine, engine.weights, Meter(CPU))
    parts["weights"].evict()
    parts["weights"].bring()
    read_weights(read_spec(folders[1]), engine.weights)
    assert tiny.ask(engine) == expected
    engine.close()
