"""Phi-3, Phi-3.5, Phi-4: in the checkpoint one tensor holds query, key and value, one gate and up projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from aligner.models.config_json import ConfigJson
from aligner.models.cuts import Block
from aligner.models.family import Defaults, Family, Window
from aligner.models.rope import Rope, RopeDefaults
from aligner.models.spec import LayerType

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec

_FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
"""A tensor of the checkpoint -> the projections in it, from top to bottom."""
_PADDING = 32000
"""transformers' pad_token_id where config.json has none."""


@dataclass(frozen=True)
class Phi3(Family):
    """Fused projections, and rotary positions of two kinds."""

    def block(self, spec: ModelSpec, part: str, kind: str = "weight") -> Block:
        """Rows of a fused tensor, but for the output and down projections."""
        for tensor, parts in _FUSED.items():
            if part in parts:
                blocks = [super(Phi3, self).block(spec, name, kind) for name in parts]
                starts = [0, *accumulate(block.rows for block in blocks)]
                at = parts.index(part)
                return Block(f"{tensor}.{kind}", blocks[at].shape, starts[at])
        return super().block(spec, part, kind)

    def read_layers(self, config: ConfigJson, layers: int) -> tuple[tuple[str, ...], dict[str, LayerType]]:
        """As of any family; transformers' class has a padding token, which must be one of the vocabulary."""
        if "pad_token_id" not in config and config.size("vocab_size") <= _PADDING:
            raise config.error(
                f"pad_token_id is not there, for which transformers takes {_PADDING}, beyond the vocabulary; set it, or null."
            )
        return super().read_layers(config, layers)

    def read_ropes(self, config: ConfigJson, defaults: RopeDefaults, names: Iterable[str]) -> dict[str, Rope]:
        """transformers' class takes "yarn" for "longrope", and refuses others."""
        return super().read_ropes(config, replace(defaults, kinds=("default", "longrope"), original=4096), names)


FAMILY = Phi3(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    title="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    defaults=Defaults(max_positions=4096, norm_eps=1e-5),
    nullable=frozenset(("num_key_value_heads",)),
    only={"full_attn_mod": (1,), "interpolate_factor": (1,)},  # of Phi-4-mini's files
    partial_rotary=True,
    window=Window.EVERY_LAYER,
    attention_note="`sliding_window` in every layer, `partial_rotary_factor`; fused projections in the checkpoint",
)
