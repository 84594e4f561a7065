"""Attention that works without TransformerEngine: packed rows, what they share, and key/value heads that several tensor ranks
share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from aligner.trainer.megatron.attention_calls import branch_calls, roots, shared_calls, starts
from aligner.trainer.megatron.attention_mask import BLOCK, causal_bias
from aligner.trainer.megatron.context_attention import context_attention
from aligner.trainer.megatron.rotary import RotarySelfAttention


@lru_cache(maxsize=64)
def _calls(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[Tensor, int, int]], Tensor]:
    """How packed rows are cut into padded attention calls.

    Returns:
        ([(flat index [rows x longest], rows, longest)], place of each packed token in the joined outputs).
    """
    length = torch.tensor(lengths)
    start = torch.cumsum(length, 0) - length
    calls, valid, base = [], [], 0
    for members in shared_calls(lengths):
        longest = lengths[members[0]]
        rows = torch.tensor(members)
        place = torch.arange(longest).expand(len(rows), longest)
        # beyond a row's end its last token is read again: causal attention never lets a real query see it
        index = start[rows][:, None] + torch.minimum(place, length[rows][:, None] - 1)
        inside = place < length[rows][:, None]
        valid.append(torch.stack([index[inside], base + torch.nonzero(inside.flatten())[:, 0]]))
        calls.append((index.flatten().to(device), len(rows), longest))
        base += index.numel()
    packed, joined = torch.cat(valid, 1)
    back = torch.empty_like(packed)
    back[packed] = joined
    return calls, back.to(device)


@dataclass(frozen=True)
class BranchCall:
    """Segments of nearly one length that begin at the same position: one call."""

    rows: int
    queries: int
    """Of each: the tokens of the longest."""
    keys: int
    """Of each: those of the ancestors that a query may look at, then its own."""
    query_index: Tensor
    """[rows x queries]: places of the queries among the packed tokens."""
    key_index: Tensor
    """[rows x keys]: places of the keys."""


@lru_cache(maxsize=64)
def _branches(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, device: torch.device
) -> tuple[list[BranchCall], Tensor]:
    """The calls of the segments after the roots, and the place of each of their tokens in the joined outputs."""
    ends = list(accumulate(lengths))
    start_of = starts(lengths, parents)
    ahead = ends[roots(parents) - 1]
    back = torch.empty(ends[-1] - ahead, dtype=torch.long)
    calls, base = [], 0
    for members in branch_calls(lengths, parents):
        longest, first = lengths[members[0]], start_of[members[0]]
        low = max(0, first - window + 1) if window else 0
        # beyond a segment's end its last token is read again: causal attention never lets a real query see it
        places = [ends[one] - lengths[one] + torch.arange(longest).clamp(max=lengths[one] - 1) for one in members]
        before = [_ancestors(one, lengths, parents, ends)[low:] for one in members]
        keys = torch.cat([torch.cat(pair) for pair in zip(before, places, strict=True)])
        calls.append(
            BranchCall(len(members), longest, first - low + longest, torch.cat(places).to(device), keys.to(device))
        )
        for row, one in enumerate(members):
            own = torch.arange(lengths[one])
            back[ends[one] - lengths[one] - ahead + own] = base + row * longest + own
        base += len(members) * longest
    return calls, back.to(device)


def _ancestors(segment: int, lengths: Sequence[int], parents: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Places of the tokens that come before a segment in its rows."""
    runs = []
    while (segment := parents[segment]) >= 0:
        runs.append(torch.arange(ends[segment] - lengths[segment], ends[segment]))
    return torch.cat(runs[::-1]) if runs else torch.zeros(0, dtype=torch.long)


def _masks_by_name(query: Tensor) -> bool:
    """CUDA's kernels know the mask of few queries after many keys by its name; the CPU's wants a tensor."""
    return query.device.type != "cpu"


def causal_attention(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, window: int | None, longest: int = 0
) -> Tensor:
    """Rows of one length, each query to the keys up to its own; with a window block by block, reading no keys before it.

    Args:
        q_BNTD: [rows, query heads, tokens, head_dim]: the last tokens of the keys' rows.
        k_BKSD, v_BKSD: [rows, key/value heads, tokens, head_dim].
        window: a query sees this many tokens, itself the last of them; None: all before it.
        longest: keys of the longest of several calls, which then share one mask.

    Returns:
        Like q_BNTD.
    """
    grouped, queries, keys = q_BNTD.shape[1] != k_BKSD.shape[1], q_BNTD.shape[2], k_BKSD.shape[2]
    earlier = keys - queries
    if window is not None and window >= keys:
        window = None
    if window is None and not earlier:
        return F.scaled_dot_product_attention(q_BNTD, k_BKSD, v_BKSD, is_causal=True, scale=scale, enable_gqa=grouped)
    if window is None and _masks_by_name(q_BNTD):
        mask = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(q_BNTD, k_BKSD, v_BKSD, attn_mask=mask, scale=scale, enable_gqa=grouped)
    longest = max(longest, keys)
    outs = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        low = max(0, earlier + start - window + 1) if window else 0
        query, key, value = (
            q_BNTD[:, :, start:stop],
            k_BKSD[:, :, low : earlier + stop],
            v_BKSD[:, :, low : earlier + stop],
        )
        most = min(longest, window + BLOCK) if window else longest
        bias = causal_bias(stop - start, key.shape[2], most, window, query)
        outs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def tree_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each segment to its ancestors and itself: gradients of what rows share come from all of them.

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim].
        lengths: tokens of each segment, in order; their sum is T.
        parents: number of each one's parent, or -1.
        window: a query sees this many tokens, itself the last of them; None: all before it in its row.

    Returns:
        [T, query heads x head_dim].
    """
    first = roots(parents)
    if first == len(parents):
        return packed_attention(q_TND, k_TKD, v_TKD, lengths, scale, window)
    calls, back = _branches(lengths, parents, window, q_TND.device)
    ahead = sum(lengths[:first])
    longest = max(call.keys for call in calls)
    outs = []
    for call in calls:
        q = q_TND.index_select(0, call.query_index).unflatten(0, (call.rows, call.queries)).transpose(1, 2)
        k, v = (
            x.index_select(0, call.key_index).unflatten(0, (call.rows, call.keys)).transpose(1, 2)
            for x in (k_TKD, v_TKD)
        )
        out = causal_attention(q, k, v, scale, window, longest)
        outs.append(out.transpose(1, 2).reshape(call.rows * call.queries, -1))
    before = packed_attention(q_TND[:ahead], k_TKD[:ahead], v_TKD[:ahead], lengths[:first], scale, window)
    return torch.cat([before, torch.cat(outs).index_select(0, back)])


def packed_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each row of a packed sequence; rows of similar length share one SDPA call (`shared_calls`).

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim].
        lengths: tokens of each row, in order; their sum is T.
        window: a query sees this many tokens, itself the last of them; None: all before it in its row.

    Returns:
        [T, query heads x head_dim].
    """
    if len(set(lengths)) == 1:  # nothing to pad: views suffice
        q, k, v = (x.view(len(lengths), lengths[0], *x.shape[1:]).transpose(1, 2) for x in (q_TND, k_TKD, v_TKD))
        out = causal_attention(q, k, v, scale, window)
        return out.transpose(1, 2).reshape(q_TND.shape[0], -1)
    calls, back = _calls(lengths, q_TND.device)
    outs = []
    for index, count, longest in calls:

        def rows(x: Tensor, index: Tensor = index, shape: tuple[int, int] = (count, longest)) -> Tensor:
            return x.index_select(0, index).view(*shape, *x.shape[1:]).transpose(1, 2)

        out = causal_attention(rows(q_TND), rows(k_TKD), rows(v_TKD), scale, window)
        outs.append(out.transpose(1, 2).reshape(count * longest, -1))
    return torch.cat(outs).index_select(0, back)


class PackedAttention(MegatronModule):
    """Megatron's core attention on torch SDPA. `attention_mask` carries `Packed.segments_S2` (int32, CPU).

    The segments travel as an argument, not as state of the module: with pipeline parallelism and recompute, the
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
        lengths, parents = (tuple(column) for column in attention_mask.T.tolist())
        q_TND, k_TKD, v_TKD = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context.size() > 1:
            drop = self.config.recompute_granularity is None
            out = context_attention(q_TND, k_TKD, v_TKD, lengths, parents, self.scale, self.context, drop, self.window)
        else:
            out = tree_attention(q_TND, k_TKD, v_TKD, lengths, parents, self.scale, self.window)
        return out.unsqueeze(1)


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
