"""Which models the transformers engine is refused for, before one is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, BertConfig, MiniMaxConfig, PreTrainedConfig, SmolLM3Config

from aligner.models.read_spec import read_spec
from aligner.rollout.config import RolloutConfig
from aligner.rollout.transformers.sizes import check_model
from aligner.spmd.mesh import Mesh
from tests.trainer.fsdp.families import FAMILIES, save_model

SETTINGS = RolloutConfig("transformers", max_model_len=32)
SIZES: dict[str, Any] = {
    "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
BART = BartConfig(
    **SIZES, d_model=64, decoder_layers=1, decoder_attention_heads=2, encoder_layers=1, encoder_attention_heads=2,
    architectures=["BartForCausalLM"],
)  # fmt: skip
BERT = BertConfig(**SIZES, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
WINDOWLESS = SmolLM3Config(
    **SIZES, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    layer_types=["sliding_attention"], sliding_window=None,
)  # fmt: skip
MINIMAX = MiniMaxConfig(
    **SIZES, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    num_local_experts=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BART, "takes no positions of its tokens"),
        (MINIMAX, "a cache of its own kind"),
        (WINDOWLESS, "has no cache by its config.json: layer_types .*sliding_attention"),
        (BERT, "is an encoder .is_decoder=false in"),
    ],
)
def test_rows_that_cannot_be_decoded_together(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"rollout.engine=transformers: {type(config).__name__[:4]}.*{reason}.*use eng"
    ):
        check_model(read_spec(tmp_path), Mesh((0,), name="rollout"), SETTINGS, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_train_also_generate(family: str, tmp_path: Path) -> None:
    """GPT-NeoX has is_decoder=false in its config.json, and is causal all the same."""
    save_model(family, tmp_path)
    check_model(read_spec(tmp_path), Mesh((0,), name="rollout"), SETTINGS, True)
