"""Causal attention of packed segments, some of which continue others: rows with a common prefix attend to one copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch import Tensor

from aligner.trainer.packed_attention import (
    causal_attention,
    has_varlen,
    packed_attention,
    shared_calls,
    varlen_attention,
)
from aligner.trainer.prefix_tree import segment_starts
from aligner.trainer.saved_views import saved_as_views


def _leading_roots(parents: Sequence[int]) -> int:
    """Number of segments without a parent before the first one that has a parent."""
    return next((index for index, parent in enumerate(parents) if parent >= 0), len(parents))


def _branch_calls(lengths: tuple[int, ...], parents: tuple[int, ...]) -> list[list[int]]:
    """Segments of each attention call after the leading roots: of similar length (`shared_calls`), starting at one position."""
    starts = segment_starts(lengths, parents)
    at_start: dict[int, list[int]] = {}
    for segment in range(_leading_roots(parents), len(lengths)):
        at_start.setdefault(starts[segment], []).append(segment)
    return [
        [members[index] for index in call]
        for members in at_start.values()
        for call in shared_calls(tuple(lengths[segment] for segment in members))
    ]


def attended(lengths: tuple[int, ...], parents: tuple[int, ...]) -> int:
    """Number of tokens that the attention calls compute for these segments, padding included."""
    calls = [*shared_calls(lengths[: _leading_roots(parents)]), *_branch_calls(lengths, parents)]
    return sum(len(call) * max(lengths[segment] for segment in call) for call in calls)


def computed_tokens(lengths: tuple[int, ...], parents: tuple[int, ...], query: Tensor) -> int:
    """Number of tokens that `prefix_attention` computes for these segments and queries of this type, device and head_dim."""
    return sum(lengths) if has_varlen(query) else attended(lengths, parents)


@dataclass(frozen=True)
class BranchCall:
    """One attention call of segments of similar length that start at the same position."""

    segments: int
    queries: int
    """Queries of each segment: the length of the longest."""
    keys: int
    """Keys of each segment: those of its ancestors (with a window, those in its first query's), then its own."""
    query_index: Tensor
    """Indices in [T] of the queries, [segments x queries]."""
    key_index: Tensor
    """Indices in [T] of the keys, [segments x keys]."""


@lru_cache(maxsize=64)
def _plan(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, device: torch.device
) -> tuple[list[BranchCall], Tensor]:
    """The calls of the segments after the leading roots, and the index of each of their tokens in the calls' concatenated
    outputs."""
    ends, starts = list(accumulate(lengths)), segment_starts(lengths, parents)
    root_tokens = ends[_leading_roots(parents) - 1]
    back = torch.empty(ends[-1] - root_tokens, dtype=torch.long)
    calls, base = [], 0
    for members in _branch_calls(lengths, parents):
        longest, start = lengths[members[0]], starts[members[0]]
        low = max(0, start - window + 1) if window else 0
        # padding repeats the segment's last token: under the causal mask no real query attends to it
        own = [ends[one] - lengths[one] + torch.arange(longest).clamp(max=lengths[one] - 1) for one in members]
        keys = [torch.cat([_ancestors(one, lengths, parents, ends)[low:], own[i]]) for i, one in enumerate(members)]
        queries, keys_of_each = torch.cat(own).to(device), torch.cat(keys).to(device)
        calls.append(BranchCall(len(members), longest, start - low + longest, queries, keys_of_each))
        for row, one in enumerate(members):
            first = ends[one] - lengths[one] - root_tokens
            back[first : first + lengths[one]] = base + row * longest + torch.arange(lengths[one])
        base += len(members) * longest
    return calls, back.to(device)


def _ancestors(segment: int, lengths: Sequence[int], parents: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Indices in [T] of the tokens before a segment in its rows."""
    runs = []
    while (segment := parents[segment]) >= 0:
        runs.append(torch.arange(ends[segment] - lengths[segment], ends[segment]))
    return torch.cat(runs[::-1]) if runs else torch.zeros(0, dtype=torch.long)


def prefix_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each segment to its ancestors and itself; the gradient of a shared token is the sum over its rows.

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim].
        lengths: tokens of each segment, in order; their sum is T.
        parents: index of each segment's parent, which comes before it; -1: it starts its rows.
        window: number of tokens that a query attends to, itself included; None: all before it in its row.

    Returns:
        [T, query heads x head_dim].
    """
    roots = _leading_roots(parents)
    if roots == len(parents):
        return packed_attention(q_TND, k_TKD, v_TKD, lengths, scale, window)
    if has_varlen(q_TND):
        return _varlen(q_TND, k_TKD, v_TKD, lengths, parents, scale, window)
    calls, back = _plan(lengths, parents, window, q_TND.device)
    root_tokens = sum(lengths[:roots])
    longest = max(call.keys for call in calls)
    outs = []
    for call in calls:
        sources = ((q_TND, call.query_index), (k_TKD, call.key_index), (v_TKD, call.key_index))
        q, k, v = (_gather(x, index, call.segments) for x, index in sources)
        again = (partial(_gather, x.detach(), index, call.segments) for x, index in sources)
        with saved_as_views(*zip((q, k, v), again, strict=True)):
            out = causal_attention(q, k, v, scale, window, longest)
        outs.append(out.transpose(1, 2).reshape(call.segments * call.queries, -1))
    q, k, v = (x[:root_tokens] for x in (q_TND, k_TKD, v_TKD))
    return torch.cat([packed_attention(q, k, v, lengths[:roots], scale, window), torch.cat(outs).index_select(0, back)])


@lru_cache(maxsize=64)
def _row_keys(
    lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """(indices in [T] of each segment's keys, those of its ancestors before its own; their number for each segment)."""
    ends = list(accumulate(lengths))
    keys = [
        torch.cat([_ancestors(one, lengths, parents, ends), torch.arange(end - lengths[one], end)])
        for one, end in enumerate(ends)
    ]
    return torch.cat(keys).to(device), tuple(map(len, keys))


def _varlen(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """All segments in one call: the queries as they are, and a copy of every segment's keys and values, which are not saved."""
    index, key_lengths = _row_keys(lengths, parents, q_TND.device)
    k, v = (x.index_select(0, index) for x in (k_TKD, v_TKD))
    again = (partial(torch.Tensor.index_select, x.detach(), 0, index) for x in (k_TKD, v_TKD))
    with saved_as_views(*zip((k, v), again, strict=True)):
        return varlen_attention(q_TND, k, v, lengths, key_lengths, scale, window)


def _gather(x: Tensor, index: Tensor, segments: int) -> Tensor:
    """[T, heads, head_dim] -> [segments, heads, tokens, head_dim]."""
    return x.index_select(0, index).unflatten(0, (segments, -1)).transpose(1, 2)
