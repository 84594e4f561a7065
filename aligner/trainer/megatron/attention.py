"""Attention modules for Megatron without TransformerEngine: packed rows, rotary tables by layer type, shared key/value heads."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from aligner.trainer.megatron.context_attention import context_attention
from aligner.trainer.megatron.packed_attention import packed_attention
from aligner.trainer.megatron.rotary import RotarySlice


class PackedAttention(MegatronModule):
    """Megatron's core attention on torch SDPA. `attention_mask` carries the rows' lengths (int32, CPU): of the
    tokens here, padding included, or with context parallelism of the whole rows.

    The lengths travel as an argument, not as state of the module: with pipeline parallelism and recompute, the
    backward of one microbatch runs after the forward of a later one.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        window: int | None = None,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.window = window
        self.context = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, 1, heads, head_dim] each -> [T, 1, heads x head_dim]."""
        lengths = tuple(attention_mask.tolist())
        q_TND, k_TKD, v_TKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context.size() > 1:
            drop = self.config.recompute_granularity is None
            out = context_attention(q_TND, k_TKD, v_TKD, lengths, self.scale, self.context, drop, self.window)
        else:
            out = packed_attention(q_TND, k_TKD, v_TKD, lengths, self.scale, self.window)
        return out.unsqueeze(1)


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention, with the rotary angles and the attention factor of its layer type.

    Megatron multiplies cosines and sines by one factor for all layers, of YaRN's form alone. Here the square of the
    factor is on the rotated dimensions of the queries, which makes the same scores.
    """

    def __init__(self, *args: Any, rotary: RotarySlice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[T, 1, hidden] -> the same; `rotary_pos_emb` [T, 1, 1, all layer types'] from `PackedRotary`."""
        own = rotary_pos_emb[..., self.rotary.start : self.rotary.stop]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)  # type: ignore[no-any-return]

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, 1, heads / tensor, head_dim], keys and values [T, 1, key/value heads / tensor, head_dim]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.rotary.scale_queries(query), key, value


class SharedHeadAttention(RotarySelfAttention):
    """Self-attention with more tensor ranks than key/value heads, each of which then serves several ranks.

    The weight's rows are still cut evenly, so a rank computes a part of some head's projections: the ranks gather
    them, and each takes its query heads and the key/value head that these share. Megatron's own does the same, but
    asks the global state for its tensor group.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T / tensor or T, 1, hidden] -> queries [T, 1, heads / tensor, head_dim], key and value [T, 1, 1, head_dim]."""
        config, group = self.config, self.pg_collection.tp
        part_T1R, _ = self.linear_qkv(hidden_states)
        rows_T1R = all_gather_last_dim_from_tensor_parallel_region(part_T1R, group)
        heads = config.num_attention_heads // config.num_query_groups
        held, sharers = config.num_attention_heads // group.size(), group.size() // config.num_query_groups
        shared, place = divmod(group.rank(), sharers)
        mine = rows_T1R.view(*rows_T1R.shape[:2], config.num_query_groups, heads + 2, config.kv_channels)[:, :, shared]
        query, key, value = mine.split([heads, 1, 1], dim=2)
        query = query[:, :, place * held : (place + 1) * held]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return self.rotary.scale_queries(query), key, value
