"""Attention modules for Megatron without TransformerEngine: packed rows, rotary tables by layer type, shared key/value heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from aligner.trainer.fused import rotate
from aligner.trainer.megatron.context_attention import context_attention
from aligner.trainer.megatron.rotary import RotarySlice
from aligner.trainer.prefix_attention import prefix_attention


@dataclass(frozen=True)
class KeptTokens:
    """The tokens that the last layer goes on with after its attention. It takes the way of Megatron's `packed_seq_params`,
    which has the attributes that Megatron reads."""

    kept_K: Tensor
    """See `Packed.kept_K`."""
    qkv_format: str = "sbhd"
    cp_group: None = None


class PackedAttention(MegatronModule):
    """Megatron's core attention, on torch SDPA. `attention_mask` carries `Packed.segments_S2` (int32, CPU).

    The segments are an argument, not module state: with pipeline parallelism and recompute, the backward of one microbatch
    runs after the forward of a later one.

    Args:
        last: of the model's last layer, which returns the kept tokens alone.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        window: int | None = None,
        last: bool = False,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.window, self.last = window, last
        self.recomputed = config.recompute_granularity is not None and (
            config.recompute_granularity == "full" or "core_attn" in config.recompute_modules
        )
        self.context = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *_: Any,
        packed_seq_params: KeptTokens | None = None,
        **__: Any,
    ) -> Tensor:
        """[T, 1, heads, head_dim] each -> [T, 1, heads x head_dim], or [K, 1, heads x head_dim]."""
        lengths, parents = (tuple(column) for column in attention_mask.T.tolist())
        q_TND, k_TKD, v_TKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context.size() > 1:
            drop = not self.recomputed
            out = context_attention(q_TND, k_TKD, v_TKD, lengths, parents, self.scale, self.context, drop, self.window)
        else:
            out = prefix_attention(q_TND, k_TKD, v_TKD, lengths, parents, self.scale, self.window)
        if self.last and packed_seq_params is not None:
            out = out.index_select(0, packed_seq_params.kept_K)
        return out.unsqueeze(1)


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention with the rotary positions of its layer type, which it applies itself: Megatron would compute
    cosines and sines anew in each layer, and multiply them by one attention factor for all of them."""

    def __init__(self, *args: Any, rotary: RotarySlice, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = rotary
        self.tables_2T1D: Tensor | None = None
        """Cosines and sines, during a forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[T, 1, hidden] -> (the same, no bias); the keyword `rotary_pos_emb`: `PackedRotary`'s tables of all layer types."""
        self.tables_2T1D = kwargs["rotary_pos_emb"][..., self.rotary.start : self.rotary.stop]
        try:
            return super().forward(*args, **{**kwargs, "rotary_pos_emb": None})
        finally:
            self.tables_2T1D = None

    def rotate(self, heads_T1ND: Tensor) -> Tensor:
        """Queries or keys at their positions."""
        assert self.tables_2T1D is not None
        return rotate(heads_T1ND.squeeze(1), *self.tables_2T1D).unsqueeze(1)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, 1, heads / tensor, head_dim], keys and values [T, 1, key/value heads / tensor, head_dim]."""
        projected: Any = super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = projected  # two where they are not to be split, four with a gate
        return self.rotate(query), self.rotate(key), _own(value)


class SharedHeadAttention(RotarySelfAttention):
    """Self-attention with more tensor-parallel ranks than key/value heads, so that several ranks share one.

    The weight's rows are still split evenly, so a rank computes a part of a head's projections. The ranks all-gather them,
    and each takes its query heads and their key/value head. Megatron's own implementation does the same, but takes its
    tensor group from global state.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T / tensor or T, 1, hidden] -> queries [T, 1, heads / tensor, head_dim], key and value [T, 1, 1, head_dim]."""
        config: Any = self.config  # whose optional fields are filled in by now
        group, projection = self.pg_collection.tp, cast(Any, self.linear_qkv)
        local_T1R, _ = projection(hidden_states)
        rows_T1R = all_gather_last_dim_from_tensor_parallel_region(local_T1R, group)
        heads = config.num_attention_heads // config.num_query_groups
        local_heads, ranks_per_kv_head = (
            config.num_attention_heads // group.size(),
            group.size() // config.num_query_groups,
        )
        kv_head, index = divmod(group.rank(), ranks_per_kv_head)
        qkv = rows_T1R.view(*rows_T1R.shape[:2], config.num_query_groups, heads + 2, config.kv_channels)[:, :, kv_head]
        query, key, value = qkv.split([heads, 1, 1], dim=2)
        query = query[:, :, index * local_heads : (index + 1) * local_heads]
        query_norm, key_norm = cast(Any, self.q_layernorm), cast(Any, self.k_layernorm)
        if query_norm is not None:
            query = query_norm(query)
        if key_norm is not None:
            key = key_norm(key)
        return self.rotate(query), self.rotate(key), _own(value)


def _own(value: Tensor) -> Tensor:
    """A copy: as a view the values would keep the projections of queries and keys, whose rotated copies are saved, until the backward."""
    return value.clone(memory_format=torch.contiguous_format)
