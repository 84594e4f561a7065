"""Exact context-parallel causal attention: each layer all-gathers the keys and values of all ranks.

The gathered tensors exist only during a layer's forward and, gathered again, its backward; in between a layer keeps only this
rank's tokens, so activation memory falls with the number of ranks. Gradients of keys and values are reduce-scattered. S: tokens of all ranks without padding; T: tokens of this rank with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from aligner.trainer.attention_mask import BLOCK, causal_bias
from aligner.trainer.context import split_rows
from aligner.trainer.prefix_tree import segment_starts
from aligner.trainer.saved_views import saved_as_views

Runs = tuple[tuple[int, int], ...]
"""Index ranges [start, stop), concatenated."""


@dataclass(frozen=True)
class Call:
    """One SDPA call on spans of equal shape: `queries` queries, the last of `keys` tokens of their row."""

    queries: int
    keys: int
    query_runs: tuple[Runs, ...]
    """Queries of each span, one run of indices in [T]."""
    key_runs: tuple[Runs, ...]
    """Keys of each span, as runs of indices in [S]."""


@dataclass(frozen=True)
class AttentionPlan:
    """One rank's attention calls and index maps."""

    calls: tuple[Call, ...]
    order_S: Tensor
    """Index of each segment's tokens, in order, in the gathered [ranks x T]."""
    back_T: Tensor
    """Index of each of this rank's tokens in the calls' concatenated outputs; padding points to one extra token of zeros."""
    longest: int
    """Largest number of keys of a call."""
    window: int | None = None
    """Number of tokens that a query attends to, itself included; None: all before it in its row."""


@lru_cache(maxsize=64)
def plan_attention(
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    ranks: int,
    rank: int,
    tokens: int,
    block: int,
    device: torch.device,
    window: int | None = None,
) -> AttentionPlan:
    """The attention calls of `rank`; spans of equal shape share a call. With a window a call reads only the keys in it.

    Args:
        tokens: T, the tokens of each rank with padding.
        block: maximum number of queries of a call; 0: no limit.
    """
    split, starts = split_rows(lengths, ranks), segment_starts(lengths, parents)
    shapes: dict[tuple[int, int], list[tuple[Runs, Runs]]] = {}
    query_start = 0
    for span in split.spans[rank]:
        step = block or span.stop
        for start in range(span.start, span.stop, step):
            stop = min(span.stop, start + step)
            queries, keys = stop - start, starts[span.row] + stop
            low = max(0, keys - queries - window + 1) if window else 0
            key_runs = _runs(low, span.row, stop, lengths, parents, split.starts)
            shapes.setdefault((queries, keys - low), []).append((((query_start, query_start + queries),), key_runs))
            query_start += queries
    calls = tuple(Call(n, m, *map(tuple, zip(*runs, strict=True))) for (n, m), runs in shapes.items())
    order_S = torch.empty(sum(lengths), dtype=torch.long)
    for other in range(ranks):
        order_S[split.token_indices(other)] = other * tokens + torch.arange(split.tokens(other))
    output_order = [torch.arange(*run) for call in calls for (run,) in call.query_runs]
    back_T = torch.full((tokens,), query_start)
    if output_order:
        back_T[torch.cat(output_order)] = torch.arange(query_start)
    return AttentionPlan(
        calls, order_S.to(device), back_T.to(device), max((call.keys for call in calls), default=0), window
    )


def _runs(
    low: int, segment: int, stop: int, lengths: Sequence[int], parents: Sequence[int], first: Sequence[int]
) -> Runs:
    """Indices in [S] of a row's tokens from position `low` to the `stop`-th token of one of its segments, whose ancestors
    hold the earlier ones.

    Args:
        first: index in [S] of each segment's first token.
    """
    runs = [(first[segment], first[segment] + stop)]
    while (segment := parents[segment]) >= 0:
        runs.append((first[segment], first[segment] + lengths[segment]))
    kept = []
    for start, end in reversed(runs):
        skipped = min(low, end - start)
        low -= skipped
        if start + skipped < end:
            kept.append((start + skipped, end))
    return tuple(kept)


@dataclass
class Gathered:
    """Keys and values of all rows [S, heads, head_dim]: dropped after the forward, gathered again for the backward."""

    group: dist.ProcessGroup
    order_S: Tensor
    rows: list[Tensor] = field(default_factory=list)

    def fill(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """All-gather them."""
        local = torch.stack([k_TKD, v_TKD])
        parts = local.new_empty(self.group.size(), *local.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), local, group=self.group)
        self.rows = [parts[:, kv].flatten(0, 1).index_select(0, self.order_S) for kv in (0, 1)]


class _Gather(torch.autograd.Function):
    """This rank's keys and values -> those of all rows. Backward: reduce-scatter of their gradients."""

    @staticmethod
    def forward(ctx: Any, k_TKD: Tensor, v_TKD: Tensor, gathered: Gathered) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gathered.fill(k_TKD, v_TKD)
        ctx.gathered, ctx.tokens = gathered, len(k_TKD)
        key, value = gathered.rows
        return key, value

    @staticmethod
    def backward(ctx: Any, grad_k_SKD: Tensor, grad_v_SKD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gathered, ranks = ctx.gathered, ctx.gathered.group.size()
        gathered.rows = []
        parts = grad_k_SKD.new_zeros(ranks, 2, ctx.tokens, *grad_k_SKD.shape[1:])
        for kv, grad in enumerate((grad_k_SKD, grad_v_SKD)):
            part = parts.new_zeros(ranks * ctx.tokens, *grad.shape[1:]).index_copy_(0, gathered.order_S, grad)
            parts[:, kv] = part.view(ranks, ctx.tokens, *grad.shape[1:])
        local = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(local, parts.flatten(0, 1), group=gathered.group)
        return local[0], local[1], None


class _GatherAgain(torch.autograd.Function):
    """Identity on the output; its backward first gathers again the keys and values that the forward dropped.

    `key` and `value` are arguments so that `_Gather`'s backward, a collective, also runs on a rank without queries.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, out: Tensor, k_TKD: Tensor, v_TKD: Tensor, key: Tensor, value: Tensor, gathered: Gathered, drop: bool
    ) -> Tensor:
        ctx.gathered, ctx.drop = gathered, drop
        if drop:
            ctx.save_for_backward(k_TKD, v_TKD)
            gathered.rows = []
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.drop:
            ctx.gathered.fill(*ctx.saved_tensors)
        return grad, None, None, None, None, None, None


def _stack_spans(x: Tensor, spans: Sequence[Runs]) -> Tensor:
    """[tokens, heads, head_dim] -> [spans, heads, count, head_dim]; a view if there is one run."""
    parts = [x[start:stop] for runs in spans for start, stop in runs]
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.unflatten(0, (len(spans), -1)).transpose(1, 2)


def _stack_gathered(gathered: Gathered, kv: int, spans: Sequence[Runs]) -> Tensor:
    return _stack_spans(gathered.rows[kv], spans)


def _max_queries(query: Tensor) -> int:
    """`block` of `plan_attention`: only CUDA's flash kernel (16 bits) runs lower-right causal attention without a mask tensor."""
    return 0 if query.device.type == "cuda" and query.element_size() == 2 else BLOCK


def _bias(call: Call, plan: AttentionPlan, query: Tensor) -> Tensor:
    if query.device.type != "cpu" and plan.window is None:  # CUDA's kernels implement this mask
        return causal_lower_right(call.queries, call.keys)
    longest = min(plan.longest, plan.window + BLOCK) if plan.window else plan.longest
    return causal_bias(call.queries, call.keys, longest, plan.window, query)


def context_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scale: float,
    group: dist.ProcessGroup,
    drop: bool = True,
    window: int | None = None,
) -> Tensor:
    """Causal attention of this rank's queries to the keys and values of all ranks, within a segment and its ancestors.

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim]; T is the same on every rank.
        lengths: tokens of each complete segment, in order.
        parents: index of each segment's parent; -1: it starts its rows.
        drop: drop the gathered keys and values and gather them again in the backward; false where the backward follows at
            once (recompute).
        window: number of tokens that a query attends to, itself included; None: all before it in its row.

    Returns:
        [T, query heads x head_dim]; 0 at padding.
    """
    block = BLOCK if window else _max_queries(q_TND)
    plan = plan_attention(lengths, parents, group.size(), group.rank(), len(q_TND), block, q_TND.device, window)
    gathered = Gathered(group, plan.order_S)
    key, value = _Gather.apply(k_TKD, v_TKD, gathered)
    is_grouped = q_TND.shape[1] != k_TKD.shape[1]
    outs = []
    for call in plan.calls:
        k, v = (_stack_spans(x, call.key_runs) for x in (key, value))
        q, bias = _stack_spans(q_TND, call.query_runs), _bias(call, plan, q_TND)
        again = (partial(_stack_gathered, gathered, kv, call.key_runs) for kv in (0, 1))
        with saved_as_views(*zip((k, v), again, strict=True)) if drop else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=is_grouped)
        outs.append(out.transpose(1, 2).reshape(-1, q_TND.shape[1] * q_TND.shape[2]))
    outs.append(q_TND.new_zeros(1, q_TND.shape[1] * q_TND.shape[2]))
    output = torch.cat(outs).index_select(0, plan.back_T)
    return _GatherAgain.apply(output, k_TKD, v_TKD, key, value, gathered, drop)  # type: ignore[no-any-return]
