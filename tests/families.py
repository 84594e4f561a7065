"""The families that stand in all tests of families by one row each.

The same rows make the tiny models of tests/models/tiny.py, the fuzz of config.json (tests/models/mutations.py), the comparison
with transformers (tests/trainer/test_parity.py) and the engines (tests/rollout/tiny.py); sizes are those of each test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import Gemma3TextConfig, MistralConfig, Olmo2Config, Phi3Config, PreTrainedConfig


@dataclass(frozen=True)
class Row:
    """One model of a family."""

    config: type[PreTrainedConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, beside the sizes of the test."""
    fuzz: bool = True
    """Its config.json is mutated; one row of each family is."""

    @property
    def tied(self) -> bool:
        """The output layer is the embedding."""
        return bool(self.settings.get("tie_word_embeddings", False))


GEMMA3 = {"head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

ROWS: dict[str, Row] = {
    "phi3": Row(Phi3Config, {"pad_token_id": 0}),
    "phi3_partial": Row(Phi3Config, {"pad_token_id": 0, "partial_rotary_factor": 0.5, "sliding_window": 6}, fuzz=False),
    "gemma3": Row(Gemma3TextConfig, {**GEMMA3, "sliding_window_pattern": 2, "rope_parameters": BY_LAYER}),
    "gemma3_biased": Row(Gemma3TextConfig, {**GEMMA3, "sliding_window_pattern": 2, "attention_bias": True}, fuzz=False),
    "mistral": Row(MistralConfig, {"sliding_window": 6}),
    "mistral_no_window": Row(MistralConfig, {"sliding_window": None}, fuzz=False),
    "olmo2": Row(Olmo2Config),
    "olmo2_bias": Row(Olmo2Config, {"attention_bias": True}, fuzz=False),
}
