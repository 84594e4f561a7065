"""The families that stand in all tests of families by one row each.

The same rows make the tiny models of tests/models/tiny.py, the fuzz of config.json (tests/models/mutations.py), the comparison
with transformers (tests/trainer/test_parity.py) and the engines (tests/rollout/tiny.py); sizes are those of each test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import MistralConfig, Olmo2Config, PreTrainedConfig


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


ROWS: dict[str, Row] = {
    "mistral": Row(MistralConfig, {"sliding_window": 6}),
    "mistral_no_window": Row(MistralConfig, {"sliding_window": None}, fuzz=False),
    "olmo2": Row(Olmo2Config),
    "olmo2_bias": Row(Olmo2Config, {"attention_bias": True}, fuzz=False),
}
