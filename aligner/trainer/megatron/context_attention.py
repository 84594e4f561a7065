"""Exact causal attention of a context-parallel rank's queries: keys and values of all ranks are gathered, layer by layer.

What is gathered lives for one layer's forward and again for its backward: between them a layer keeps only its own
tokens, so that activations fall with the number of ranks. The gradients of keys and values are summed where they came
from. S counts the real tokens of all ranks, T those of this rank, with its padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.bias import causal_lower_right

from aligner.trainer.context import split_rows
from aligner.trainer.megatron.attention_calls import starts
from aligner.trainer.megatron.attention_mask import BLOCK, causal_bias

Runs = tuple[tuple[int, int], ...]
"""Consecutive tokens, as (first, one past the last); what they hold follows one another."""


@dataclass(frozen=True)
class Call:
    """One SDPA call: `queries` tokens from each of `at`, each time after `keys - queries` earlier ones of their row."""

    queries: int
    keys: int
    at: tuple[Runs, ...]
    """Among this rank's tokens: the queries, which are one run."""
    among: tuple[Runs, ...]
    """Among all ranks' segments: the keys."""


@dataclass(frozen=True)
class Plan:
    """One rank's calls, and where things are."""

    calls: tuple[Call, ...]
    order_S: Tensor
    """Place of each segment's tokens, in order, in what [ranks, T] are when gathered."""
    back_T: Tensor
    """Place of each of this rank's tokens in the calls' joined outputs; its padding reads one more token, of zeros."""
    longest: int
    window: int | None = None
    """A query sees this many tokens, itself the last of them; None: all before it in its row."""


@lru_cache(maxsize=64)
def make_plan(
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    ranks: int,
    rank: int,
    held: int,
    block: int,
    device: torch.device,
    window: int | None = None,
) -> Plan:
    """The calls of `rank`; spans of equal shape share one. With a window a call reads no keys before it.

    Args:
        held: tokens of each rank, with its padding.
        block: queries of one call at most; 0: no limit.
    """
    split, before = split_rows(lengths, ranks), starts(lengths, parents)
    shapes: dict[tuple[int, int], list[tuple[Runs, Runs]]] = {}
    at = 0
    for span in split.spans[rank]:
        step = block or span.stop
        for start in range(span.start, span.stop, step):
            stop = min(span.stop, start + step)
            queries, keys = stop - start, before[span.row] + stop
            low = max(0, keys - queries - window + 1) if window else 0
            runs = _runs_from(low, span.row, stop, lengths, parents, split.starts)
            shapes.setdefault((queries, keys - low), []).append((((at, at + queries),), runs))
            at += queries
    calls = tuple(Call(n, m, *map(tuple, zip(*places, strict=True))) for (n, m), places in shapes.items())
    order_S = torch.empty(sum(lengths), dtype=torch.long)
    for other in range(ranks):
        order_S[split.token_indices(other)] = other * held + torch.arange(split.tokens(other))
    joined = [torch.arange(first, stop) for call in calls for ((first, stop),) in call.at]
    back_T = torch.full((held,), at)
    if joined:
        back_T[torch.cat(joined)] = torch.arange(at)
    return Plan(calls, order_S.to(device), back_T.to(device), max(call.keys for call in calls) if calls else 0, window)


def _runs_from(
    low: int, segment: int, stop: int, lengths: Sequence[int], parents: Sequence[int], firsts: Sequence[int]
) -> Runs:
    """A row's tokens from position `low` to the `stop`-th of one of its segments, whose ancestors hold the earlier ones."""
    runs = [(firsts[segment], firsts[segment] + stop)]
    while (segment := parents[segment]) >= 0:
        runs.append((firsts[segment], firsts[segment] + lengths[segment]))
    kept = []
    for first, end in reversed(runs):
        skipped = min(low, end - first)
        low -= skipped
        if first + skipped < end:
            kept.append((first + skipped, end))
    return tuple(kept)


@dataclass
class Gathered:
    """Keys and values of all rows [S, heads, head_dim]: dropped after the forward, here again for the backward."""

    group: dist.ProcessGroup
    order_S: Tensor
    rows: list[Tensor] = field(default_factory=list)

    def fill(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """One all-gather."""
        own = torch.stack([k_TKD, v_TKD])
        parts = own.new_empty(self.group.size(), *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own, group=self.group)
        self.rows = [parts[:, which].flatten(0, 1).index_select(0, self.order_S) for which in (0, 1)]


class _Gather(torch.autograd.Function):
    """Own keys and values -> all rows'. Backward: each rank gets the sum of the gradients of what it gave."""

    @staticmethod
    def forward(ctx: Any, k_TKD: Tensor, v_TKD: Tensor, gathered: Gathered) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gathered.fill(k_TKD, v_TKD)
        ctx.gathered, ctx.held = gathered, len(k_TKD)
        key, value = gathered.rows
        return key, value

    @staticmethod
    def backward(ctx: Any, grad_k_SKD: Tensor, grad_v_SKD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gathered, ranks = ctx.gathered, ctx.gathered.group.size()
        gathered.rows = []
        parts = grad_k_SKD.new_zeros(ranks, 2, ctx.held, *grad_k_SKD.shape[1:])
        for which, grad in enumerate((grad_k_SKD, grad_v_SKD)):
            part = parts.new_zeros(ranks * ctx.held, *grad.shape[1:]).index_copy_(0, gathered.order_S, grad)
            parts[:, which] = part.view(ranks, ctx.held, *grad.shape[1:])
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=gathered.group)
        return own[0], own[1], None


class _GatherAgain(torch.autograd.Function):
    """The output as it is; its backward begins by gathering what the forward has dropped.

    Keys and values are arguments so that `_Gather`'s backward runs even on a rank that has no query among them:
    both collectives are the whole group's.
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


def _rows_of(x: Tensor, rows: Sequence[Runs]) -> Tensor:
    """[tokens, heads, head_dim] -> [rows, heads, count, head_dim]: a view where one run is all."""
    parts = [x[first:stop] for runs in rows for first, stop in runs]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.unflatten(0, (len(rows), -1)).transpose(1, 2)


def _kept_out(gathered: Gathered, call: Call, key: Tensor, value: Tensor) -> AbstractContextManager[Any]:
    """Inside, autograd keeps a note instead of a call's keys and values, and makes them again when it wants them."""
    which_of = {key.untyped_storage().data_ptr(): 0, value.untyped_storage().data_ptr(): 1}

    def pack(x: Tensor) -> Any:
        which = which_of.get(x.untyped_storage().data_ptr())
        return x if which is None else (which, x.size(), x.stride(), x.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        which, *view = kept
        return _rows_of(gathered.rows[which], call.among).as_strided(*view)

    return saved_tensors_hooks(pack, unpack)


def _block(query: Tensor) -> int:
    """Only CUDA's flash kernel, which takes 16 bits, has causal attention of few queries to many keys without a mask."""
    return 0 if query.device.type == "cuda" and query.element_size() == 2 else BLOCK


def _bias(call: Call, plan: Plan, query: Tensor) -> Tensor:
    if query.device.type != "cpu" and plan.window is None:  # CUDA's kernels know this mask by its name
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
    """Causal attention of this rank's queries to the keys and values of all ranks, in each segment and its ancestors.

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim]; T is the same on every rank.
        lengths: tokens of each whole segment, in order.
        parents: number of each one's parent, or -1.
        drop: gather keys and values again in the backward; false where the backward follows at once (recompute).
        window: a query sees this many tokens, itself the last of them; None: all before it in its row.

    Returns:
        [T, query heads x head_dim]; 0 at the padding.
    """
    block = BLOCK if window else _block(q_TND)
    plan = make_plan(lengths, parents, group.size(), group.rank(), len(q_TND), block, q_TND.device, window)
    gathered = Gathered(group, plan.order_S)
    key, value = _Gather.apply(k_TKD, v_TKD, gathered)
    grouped = q_TND.shape[1] != k_TKD.shape[1]
    outs = []
    for call in plan.calls:
        k, v = (_rows_of(x, call.among) for x in (key, value))
        q, bias = _rows_of(q_TND, call.at), _bias(call, plan, q_TND)
        with _kept_out(gathered, call, k, v) if drop else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
        outs.append(out.transpose(1, 2).reshape(-1, q_TND.shape[1] * q_TND.shape[2]))
    outs.append(q_TND.new_zeros(1, q_TND.shape[1] * q_TND.shape[2]))
    joined = torch.cat(outs).index_select(0, plan.back_T)
    return _GatherAgain.apply(joined, k_TKD, v_TKD, key, value, gathered, drop)  # type: ignore[no-any-return]
