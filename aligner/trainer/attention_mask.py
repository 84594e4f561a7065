"""Additive masks for causal attention of a block of queries, optionally with a sliding window."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Maximum queries of an attention call with a mask tensor, which is at most [BLOCK, keys], one for all layers of a window."""


def causal_bias(queries: int, keys: int, longest: int, window: int | None, like: Tensor) -> Tensor:
    """[queries, keys] of `like`'s data type and device: 0 where a query attends, -inf elsewhere.

    Args:
        queries: number of queries, the last of the row's `keys` tokens; at most BLOCK.
        longest: number of keys of the longest call: all smaller masks are views of one.
        window: number of tokens that a query attends to, itself included; None: all before it.
    """
    width = -(-max(keys, longest) // BLOCK) * BLOCK
    return _mask(BLOCK, width, window, like.dtype, like.device)[BLOCK - queries :, width - keys :]


@lru_cache(maxsize=4)
def _mask(block: int, longest: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[block, longest]; the last query belongs to the last key. Smaller masks are views of its lower right corner."""
    hidden = torch.ones(block, longest, dtype=torch.bool, device=device).triu(longest - block + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(longest - block - window)
    return torch.zeros(block, longest, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
