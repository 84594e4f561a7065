"""Causal attention inside packed rows on torch SDPA: rows of similar length share one padded call."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.trainer.megatron.attention_mask import BLOCK, causal_bias

WASTE = 0.03
"""Tokens that pad shorter rows to the longest of their call, at most, as a share of the rows' own tokens."""


@lru_cache(maxsize=64)  # the attention and the accounts of a microbatch ask for the same
def shared_calls(lengths: tuple[int, ...]) -> list[list[int]]:
    """Rows of each attention call, longest first; all calls together pad by at most WASTE of the rows' tokens.

    Rows of neighbouring lengths share a call until its padding reaches an allowance, alike for all calls, so that rows
    of few tokens may differ by more; it is lowered until the sum is low enough.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    limit = int(WASTE * sum(lengths))
    allowance = limit
    while True:
        calls: list[list[int]] = []
        total = padding = 0
        for row in order:
            more = lengths[calls[-1][0]] - lengths[row] if calls else 0
            if not calls or padding + more > allowance:
                calls.append([])
                padding = more = 0
            calls[-1].append(row)
            padding += more
            total += more
        if total <= limit:
            return calls
        allowance = allowance * 9 // 10


def attended(lengths: tuple[int, ...]) -> int:
    """Tokens that the attention calls compute for these rows, padding included."""
    return sum(len(call) * lengths[call[0]] for call in shared_calls(lengths))


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


def causal_attention(q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, window: int | None) -> Tensor:
    """Rows of one length, each query to the keys up to its own; with a window block by block, reading no keys before it.

    Args:
        q_BNTD: [rows, query heads, tokens, head_dim]; k_BKTD, v_BKTD: [rows, key/value heads, tokens, head_dim].
        window: a query sees this many tokens, itself the last of them; None: all before it.

    Returns:
        Like q_BNTD.
    """
    grouped, length = q_BNTD.shape[1] != k_BKTD.shape[1], q_BNTD.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q_BNTD, k_BKTD, v_BKTD, is_causal=True, scale=scale, enable_gqa=grouped)
    outs = []
    for start in range(0, length, BLOCK):
        stop, low = min(start + BLOCK, length), max(0, start - window + 1)
        query, key, value = q_BNTD[:, :, start:stop], k_BKTD[:, :, low:stop], v_BKTD[:, :, low:stop]
        bias = causal_bias(stop - start, stop - low, min(length, window + BLOCK), window, query)
        outs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped))
    return torch.cat(outs, 2)


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
