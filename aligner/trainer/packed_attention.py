"""Causal attention inside packed rows: on CUDA torch's varlen kernel, else SDPA, where rows of similar length share one padded call."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from aligner.trainer.attention_mask import BLOCK, causal_bias
from aligner.trainer.short_row_attention import is_short_row, short_row_attention

WASTE = 0.03
"""Maximum padding of all attention calls together, as a fraction of the rows' tokens."""


@lru_cache(maxsize=64)  # asked by the attention and for the metric `padding` of a microbatch
def shared_calls(lengths: tuple[int, ...]) -> list[list[int]]:
    """Row indices of each attention call, longest row first; total padding is at most WASTE of the rows' tokens.

    Rows of similar length share a call until its padding reaches an allowance, the same number of tokens for every call,
    so short rows may differ relatively more; the allowance is lowered until the total is within the limit.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    limit = int(WASTE * sum(lengths))
    allowance = limit
    while True:
        calls: list[list[int]] = []
        total = padding = 0
        for row in order:
            row_padding = lengths[calls[-1][0]] - lengths[row] if calls else 0
            if not calls or padding + row_padding > allowance:
                calls.append([])
                padding = row_padding = 0
            calls[-1].append(row)
            padding += row_padding
            total += row_padding
        if total <= limit:
            return calls
        allowance = allowance * 9 // 10


@lru_cache(maxsize=64)
def _calls(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[Tensor, int, int]], Tensor]:
    """Indices that gather packed rows into padded attention calls, and back.

    Returns:
        ([(token indices [rows x longest], rows, longest)] of each call, index [T] of each packed token in the calls'
        concatenated outputs).
    """
    length = torch.tensor(lengths)
    start = torch.cumsum(length, 0) - length
    calls, index_pairs, base = [], [], 0
    for members in shared_calls(lengths):
        longest = lengths[members[0]]
        rows = torch.tensor(members)
        position = torch.arange(longest).expand(len(rows), longest)
        # padding repeats the row's last token: under the causal mask no real query attends to it
        index = start[rows][:, None] + torch.minimum(position, length[rows][:, None] - 1)
        inside = position < length[rows][:, None]
        index_pairs.append(torch.stack([index[inside], base + torch.nonzero(inside.flatten())[:, 0]]))
        calls.append((index.flatten().to(device), len(rows), longest))
        base += index.numel()
    packed, joined = torch.cat(index_pairs, 1)
    back = torch.empty_like(packed)
    back[packed] = joined
    return calls, back.to(device)


def _implements_lower_right(query: Tensor) -> bool:
    """CUDA's kernels implement the causal mask of fewer queries than keys; the CPU's need a tensor."""
    return query.device.type != "cpu"


def _lacks_grouped_kernel(query: Tensor) -> bool:
    """CUDA's only kernel for float32 that makes no [rows, heads, T, T] wants as many key/value heads as query heads."""
    return query.device.type == "cuda" and query.element_size() == 4


def causal_attention(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, window: int | None, longest: int = 0
) -> Tensor:
    """Causal attention of rows of one length, the queries being the last tokens of the keys' rows; with a window in blocks of
    queries, which read only the keys in their windows.

    Args:
        q_BNTD: [rows, query heads, T, head_dim]; k_BKSD, v_BKSD: [rows, key/value heads, S, head_dim], S >= T.
        window: number of tokens that a query attends to, itself included; None: all before it.
        longest: largest S of several calls, so that they share one mask tensor.

    Returns:
        Like q_BNTD.
    """
    if _lacks_grouped_kernel(q_BNTD):
        group = q_BNTD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD = (x.repeat_interleave(group, 1) for x in (k_BKSD, v_BKSD))
    queries, keys, is_grouped = q_BNTD.shape[2], k_BKSD.shape[2], q_BNTD.shape[1] != k_BKSD.shape[1]
    is_short, earlier = is_short_row(q_BNTD, keys), keys - queries
    if window is None or window >= keys:
        if not is_short and (not earlier or _implements_lower_right(q_BNTD)):
            mask = causal_lower_right(queries, keys) if earlier else None
            return F.scaled_dot_product_attention(
                q_BNTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
            )
        window = None
    longest = max(longest, keys)
    if window is not None:
        longest = min(longest, window + BLOCK)
    outs = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        low = max(0, earlier + start - window + 1) if window else 0
        query, key, value = q_BNTD[:, :, start:stop], *(x[:, :, low : earlier + stop] for x in (k_BKSD, v_BKSD))
        bias = causal_bias(stop - start, key.shape[2], longest, window, query)
        outs.append(
            short_row_attention(query, key, value, scale, bias)
            if is_short
            else F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=is_grouped)
        )
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def has_varlen(query: Tensor) -> bool:
    """Whether `varlen_attention` runs: torch's flash kernels, for 16 bits on GPUs of the Ampere generation and later."""
    return (
        query.device.type == "cuda"
        and query.element_size() == 2
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[rows + 1] int32: where each row begins, and the end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def varlen_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of rows of any lengths in one kernel, without padding or gathers; a row's queries are its last tokens.

    Args:
        q_TND: [T, query heads, head_dim], the rows' queries one after the other; k_SKD: [S, key/value heads, head_dim]; v_SKD the
            same, or with fewer dimensions (latent attention).
        query_lengths, key_lengths: of each row; they sum to T and S.
        window: number of tokens that a query attends to, itself included; None: all before it in its row.

    Returns:
        [T, query heads x dimensions of a value].
    """
    offsets_q, offsets_k = (_offsets(lengths, q_TND.device) for lengths in (query_lengths, key_lengths))
    value_dim, lacking = v_SKD.shape[-1], q_TND.shape[-1] - v_SKD.shape[-1]
    if lacking:  # the kernel has one size for all three
        v_SKD = F.pad(v_SKD, (0, lacking))
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q_TND,
        k_SKD,
        v_SKD,
        offsets_q,
        offsets_k,
        max(query_lengths),
        max(key_lengths),
        scale=scale,
        window_size=(left, 0),
        enable_gqa=q_TND.shape[1] != k_SKD.shape[1],
    )
    assert isinstance(out, Tensor)
    return (out[..., :value_dim] if lacking else out).flatten(1)


def packed_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each row of a packed sequence: `varlen_attention` where it runs; else rows of similar length
    share one SDPA call (`shared_calls`).

    Args:
        q_TND: [T, query heads, head_dim]; k_TKD, v_TKD: [T, key/value heads, head_dim].
        lengths: tokens of each row, in order; their sum is T.
        window: number of tokens that a query attends to, itself included; None: all before it in its row.

    Returns:
        [T, query heads x head_dim].
    """
    if has_varlen(q_TND):
        return varlen_attention(q_TND, k_TKD, v_TKD, lengths, lengths, scale, window)
    if len(set(lengths)) == 1:  # no padding needed: views suffice
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
