"""The real engine on changed config.json files: it computes what transformers computes, and knows what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.4}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.25 * pair for pair in range(16)],
    "long_factor": [9.0] * 16,
    "original_max_position_embeddings": 100,
}
ABSENT = "absent"
slow = pytest.mark.slow
CASES = [
    pytest.param("llama", {"rope_scaling": LLAMA3}, id="llama3 beside rope_parameters"),
    pytest.param("qwen2", {"rope_scaling": LINEAR, "architectures": ABSENT}, id="linear, no architecture named"),
    pytest.param("llama", {"rope_scaling": YARN}, id="yarn"),
    pytest.param("qwen3_tied", {"rope_scaling": {**YARN, "attention_factor": None, "beta_fast": 2.0}}, marks=slow),
    pytest.param("llama", {"rope_scaling": LONG}, marks=slow),
    pytest.param("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, marks=slow),
    pytest.param("llama", {"rope_scaling": LINEAR, "rope_parameters": ABSENT, "rope_theta": 500.0}, marks=slow),
    pytest.param("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}, marks=slow),
    pytest.param("llama", {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 1e6}, marks=slow),
    pytest.param("llama", {"rms_norm_eps": 0.5, "tie_word_embeddings": False}, marks=slow),
    pytest.param("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}, marks=slow),
    pytest.param("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": ABSENT}, marks=slow),
    pytest.param("llama", {"layer_types": ["attention", "full_attention"], "max_sequence_length": 100}, marks=slow),
    pytest.param("qwen2", {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0}, marks=slow),
    pytest.param("qwen3_tied", {"rope_scaling": LLAMA3, "architectures": None}, marks=slow),
    pytest.param("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}, marks=slow),
    pytest.param("qwen3_moe", {"rope_scaling": LINEAR}, marks=slow),
    pytest.param("mixtral", {"num_experts_per_tok": 4, "rope_parameters": ABSENT}, marks=slow),
    pytest.param("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": LINEAR}, marks=slow),
]


@pytest.mark.parametrize(("family", "change"), CASES)
def test_the_engine_computes_what_the_file_says(
    family: str, change: dict[str, Any], models: dict[str, tuple[Any, str]], group: dist.ProcessGroup, tmp_path: Path
) -> None:
    plain, source = models[family]
    config = json.loads((Path(source) / "config.json").read_text()) | change
    kept = {key: value for key, value in config.items() if value != ABSENT}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "model.safetensors").symlink_to(Path(source) / "model.safetensors")
    (tmp_path / "params.json").write_text('{"dim": 1}')  # the same model's, of another kind: not read
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    engine = VllmEngine(tmp_path, group, "test", tiny.CONFIG, torch.device("cpu"))
    try:
        weights = EngineWeights(engine)
        tiny.write(weights, model)
        asked = tiny.prompts(4)
        found = engine.generate(asked, [0] * 4, Sampling(temperature=0.0, max_tokens=24, stop_token_ids=()))
        gaps = [tiny.gap(model, prompt, one) for prompt, (one,) in zip(asked, found, strict=True)]
        assert max(gaps) < 1e-4
        if {"rope_scaling", "rope_theta", "rms_norm_eps", "num_experts_per_tok"} & set(change):  # which show
            assert max(tiny.gap(plain, prompt, one) for prompt, (one,) in zip(asked, found, strict=True)) > 1e-3
    finally:
        engine.close()
