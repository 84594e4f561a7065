"""Rotary positions of the engine on a CPU, for queries and keys that come as [tokens, heads, head_dim] (latent attention)."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


def mend_cpu_rotary() -> None:
    """Let vLLM rotate all heads of such a query by their token's position.

    vLLM 0.32.0's CPU kernel takes the heads from the last dimension and the distance of tokens from the one before, which is
    right for [tokens, heads x head_dim] alone: of three dimensions it rotates other rows than it should, by other positions,
    or not at all. Mended, these go through vLLM's plain implementation, as its GPU kernel would compute them.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    kernel: Any = RotaryEmbedding.forward_cpu
    if hasattr(kernel, "__wrapped__"):
        return

    @functools.wraps(kernel)
    def mended(self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        flat = query.dim() == 2 and (key is None or key.dim() == 2)
        return (kernel if flat else type(self).forward_native)(self, positions, query, key)  # type: ignore[no-any-return]

    RotaryEmbedding.forward_cpu = mended  # type: ignore[method-assign]
