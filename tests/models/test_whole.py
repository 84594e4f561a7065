"""A checkpoint whose tensors are not those of its config.json is refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aligner.models.family import logical_tensors
from aligner.models.spec import read_spec
from aligner.models.whole import check_names, check_weights
from tests.models.tiny import MODELS, save_tiny, stored_tensors


@pytest.mark.parametrize("name", MODELS)
def test_whole_checkpoints_pass(name: str, tmp_path: Path) -> None:
    check_weights(read_spec(save_tiny(name, tmp_path)))


def test_undeclared_tensors_are_named(tmp_path: Path) -> None:
    config = json.loads((save_tiny("llama-bias", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_bias": False}))
    spec = read_spec(tmp_path)
    # by hand: gate, up and down biases of 4 layers
    with pytest.raises(ValueError, match=r"tensor model\.layers\.0\.mlp\.down_proj\.bias and 11 more which its config"):
        check_names(spec, logical_tensors(spec))


def test_copies_of_what_is_known_are_let_be(tmp_path: Path) -> None:
    spec = read_spec(save_tiny("qwen3-tied", tmp_path))
    extra = {"lm_head.weight": torch.zeros(67, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(stored_tensors(tmp_path) | extra, tmp_path / "model.safetensors")
    check_names(spec, logical_tensors(spec))
