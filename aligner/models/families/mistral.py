"""Mistral: Llama's layers, and in some releases a sliding window in all of them."""

from __future__ import annotations

from dataclasses import dataclass

from aligner.models.config_json import ConfigJson
from aligner.models.family import Defaults, Family, Window
from aligner.models.spec import LayerType


@dataclass(frozen=True)
class Mistral(Family):
    """All layers are alike."""

    def read_layers(self, config: ConfigJson, layers: int) -> tuple[tuple[str, ...], dict[str, LayerType]]:
        """As of any family, but for layer_types, with which transformers takes the file for a Ministral's."""
        if "layer_types" in config:
            raise config.error(
                f"layer_types={config.get('layer_types')!r} makes transformers take the model for a Ministral, whose layers "
                "differ; remove layer_types if sliding_window is that of all layers."
            )
        return super().read_layers(config, layers)


FAMILY = Mistral(
    model_type="mistral",
    architecture="MistralForCausalLM",
    title="Mistral 7B, Mistral Nemo, Mistral Small",
    defaults=Defaults(kv_heads=8, max_positions=131072, sliding_window=4096),
    nullable=frozenset(("head_dim",)),
    window=Window.EVERY_LAYER,
)
