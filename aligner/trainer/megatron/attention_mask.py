"""Masks of causal attention of some queries to the keys up to theirs, within a window where there is one."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Queries in one call where their mask is a tensor: [BLOCK, keys] at most, one for all layers of one window."""


def causal_bias(queries: int, keys: int, longest: int, window: int | None, like: Tensor) -> Tensor:
    """[queries, keys] of `like`'s data type and device: 0 where a query may look, -inf elsewhere.

    Args:
        queries: the last of `keys` tokens of a row, BLOCK at most.
        longest: keys of the longest call: all smaller masks are views of one.
        window: a query sees this many tokens, itself the last of them; None: all before it.
    """
    width = -(-max(keys, longest) // BLOCK) * BLOCK
    return _mask(BLOCK, width, window, like.dtype, like.device)[BLOCK - queries :, width - keys :]


@lru_cache(maxsize=4)
def _mask(block: int, longest: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[block, longest]; the last query is the last key's. Smaller masks are its lower right corner, views that share
    the memory."""
    hidden = torch.ones(block, longest, dtype=torch.bool, device=device).triu(longest - block + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(longest - block - window)
    return torch.zeros(block, longest, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
