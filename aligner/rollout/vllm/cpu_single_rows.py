"""A step of one row on a CPU rounds as a step of several: what is sampled must not depend on which requests share a step.

vLLM's CPU kernels compute a row of a batch the same, bit for bit, whatever stands beside it, with one exception that was measured
(fp32 and bf16, widths of 256 to 896, 2 to 96 rows): for a single row oneDNN multiplies matrices in another order of additions.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


def compute_single_rows_as_two() -> None:
    """Let vLLM's matrix product on a CPU take a single row twice. Call it after the platform was imported."""
    from vllm import _custom_ops

    product: Any = _custom_ops.onednn_mm
    if hasattr(product, "__wrapped__"):
        return

    @functools.wraps(product)
    def onednn_mm(dnnl_handler: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() != x.shape[-1]:
            return product(dnnl_handler, x, bias)  # type: ignore[no-any-return]
        row = x.reshape(1, -1)
        output: Tensor = product(dnnl_handler, row.repeat(2, 1), bias)
        return output[0].view(*x.shape[:-1], -1)

    _custom_ops.onednn_mm = onednn_mm
