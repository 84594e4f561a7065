"""Gemma 3, text only: local and global attention layers, each with its own rotary embedding; four norms per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aligner.models.config_json import ConfigJson
from aligner.models.family import FULL, SLIDING, Defaults, EngineTraits, Family, Norms
from aligner.models.rope import Rope, RopeDefaults, read_rope_by_layer_type
from aligner.models.spec import LayerType, QKNorm


@dataclass(frozen=True)
class Gemma3(Family):
    """Two layer types; transformers' own name of the classifier."""

    @property
    def classifier(self) -> str:
        """The text model's; Gemma3ForSequenceClassification is multimodal."""
        return "Gemma3TextForSequenceClassification"

    def read_layers(self, config: ConfigJson, layers: int) -> tuple[tuple[str, ...], dict[str, LayerType]]:
        """`layer_types`, or every `sliding_window_pattern`-th layer global, as in files of transformers 4."""
        config.only("use_sliding_window", (False,))
        window = config.size("sliding_window", self.defaults.sliding_window)
        pattern, names = config.size("sliding_window_pattern", 6), config.get("layer_types")
        if names is None:
            names = [FULL if number % pattern == 0 else SLIDING for number in range(1, layers + 1)]
        if not isinstance(names, list) or len(names) != layers:
            raise config.error(f"layer_types must be null or a list of as many entries as num_hidden_layers={layers}.")
        other = [name for name in names if name not in (FULL, SLIDING)]
        if other:
            raise config.error(f"layer_types has {other[0]!r}, which is not supported; use {FULL!r} or {SLIDING!r}.")
        return tuple(names), {FULL: LayerType(), SLIDING: LayerType(window)}

    def read_ropes(self, config: ConfigJson, defaults: RopeDefaults, names: Iterable[str]) -> dict[str, Rope]:
        """One rotary embedding for global attention, one for local."""
        thetas = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}
        return read_rope_by_layer_type(config, defaults, thetas, scaled=FULL)

    def longest(self, ropes: Sequence[Rope], max_positions: int) -> int:
        """max_position_embeddings is the length after scaling, for vLLM too."""
        return min(max_positions, super().longest(ropes, max_positions))


FAMILY = Gemma3(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    title="Gemma 3 270M, 1B, and the text models of larger ones",
    defaults=Defaults(kv_heads=4, head_dim=256, max_positions=131072, sliding_window=4096, tied=True),
    nullable=frozenset(("attention_dropout",)),
    only={"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
    inert=frozenset(("_sliding_window_pattern", "cache_implementation")),
    optional_biases=("attention_bias",),
    divided_hidden=True,
    norms=Norms(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    norm_plus_one=True,
    qk_norm=QKNorm.HEAD,
    score_scalar="query_pre_attn_scalar",
    score_scalar_default=256,
    activations=("gelu_pytorch_tanh",),
    activation_field="hidden_activation",
    attention_note="local (`sliding_window`) and global layers by `layer_types`, each with its own rotary embedding",
    scaled_embedding=True,
    engine=EngineTraits(ends_everywhere=True, output_bias=True),
)
