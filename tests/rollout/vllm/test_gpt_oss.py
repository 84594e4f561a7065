"""gpt-oss: experts whose checkpoint has gates and ups in turn, transposed, with biases, packed for vLLM's CPU kernel and proven."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import aligner.rollout.vllm.engine as engine_module
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.experts import PackedExperts
from tests.conftest import Ranks
from tests.rollout import tiny
from tools.family_models import write_model

CPU = torch.device("cpu")


def test_a_synced_engine_is_a_fresh_one_and_a_wrong_bias_is_seen(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    models = []
    for seed, folder in enumerate(folders):
        model = write_model("gpt_oss", folder, seed)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.3)  # transformers begins with 0
        model.save_pretrained(folder)
        models.append(model)
    config = replace(tiny.CONFIG, max_num_seqs=8)
    monkeypatch.setattr(engine_module, "LOAD_FORMAT", "auto")
    fresh = VllmEngine(folders[1], group, f"fresh{os.getpid()}", config, CPU)
    fresh.loaded.finish()
    expected = tiny.ask(fresh)
    fresh.close()
    monkeypatch.setattr(engine_module, "LOAD_FORMAT", "dummy")
    engine = VllmEngine(folders[0], group, f"synced{os.getpid()}", config, CPU)
    answers = []
    for model in models:
        tiny.write(engine.weights, model)
        answers.append(tiny.ask(engine))
    assert answers[1] == expected != answers[0]
    pack = PackedExperts.pack

    def garbled(self: PackedExperts, plain: Any) -> None:
        pack(self, plain)
        self._module.w2_bias.data[1, 5] += 0.01

    monkeypatch.setattr(PackedExperts, "pack", garbled)
    with pytest.raises(RuntimeError, match=r"packed kernel of model.layers.0.mlp.experts, expert 1 \("):
        tiny.write(engine.weights, models[0])
    engine.close()


def test_tensor_parallel_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    write_model("gpt_oss", tmp_path)
    ranks(2).run("tests.rollout.vllm.gpt_oss_on_ranks:check_tensor_parallel", tmp_path, seconds=200)
