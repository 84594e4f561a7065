"""What a row costs a model against torch's own count of the FLOPs of transformers' forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from aligner.models.cost import row_cost
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.spmd.cost import TOKENS, Cost
from tests.models.tiny import SIZES, save_tiny


def _flops(model: PreTrainedModel, tokens: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.arange(tokens)[None] % SIZES["vocab_size"])
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gemma-tied", "qwen3-moe", "mixtral"])
def test_as_many_flops_as_torch_counts(name: str, tmp_path: Path) -> None:
    cost = row_cost(read_spec(save_tiny(name, tmp_path)))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # products that torch can count
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **eager)
    for tokens in (16, 64):
        # torch counts all pairs of tokens, of which causal attention needs one half
        assert _flops(model, tokens) == cost.linear * tokens + 2 * cost.quadratic * tokens**2


def test_a_scalar_head_has_one_output(tmp_path: Path) -> None:
    spec = read_spec(save_tiny("llama", tmp_path))
    language, scalar = row_cost(spec), row_cost(with_scalar_head(spec))
    assert language.linear - scalar.linear == 2 * 32 * (67 - 1)
    assert language.quadratic == scalar.quadratic


def test_by_hand() -> None:
    assert TOKENS.of(7) == 7
    assert Cost(3, 2).of(5) == 3 * 5 + 2 * 25
