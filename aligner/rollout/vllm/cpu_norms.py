"""RMSNorm of the engine on a CPU by vLLM's own kernel, which its CPU build has and does not use: one call in place of six to nine.
In bfloat16 it rounds once, as training does, where the plain one rounds before it multiplies by the weight, too.

vLLM picks an implementation of its norms by name from those that were registered; on a CPU it has the plain one alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

PROVIDER = "cpu_kernel"
WIDTH = 16
"""The kernel works on whole vectors of this many numbers at most."""


def priority() -> Any:
    """vLLM's setting that prefers the kernel; registers it first. Call it after the platform was imported."""
    from vllm import ir
    from vllm.config.kernel import IrOpPriorityConfig

    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits)(rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_fits_add, inplace=True)(fused_add_rms_norm)
    known = asdict(IrOpPriorityConfig())
    return IrOpPriorityConfig(
        **{name: [PROVIDER, "native"] for name in ("rms_norm", "fused_add_rms_norm") if name in known}
    )


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; x may be a view of several heads' columns."""
    # The kernel takes rows to stand one after the other, and a single head's columns can be reshaped without a copy.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(out, rows, weight, epsilon)
    return out.view(x.shape)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + x_residual), x + x_residual), in place."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    whole = variance_size is None and weight is not None and x.shape[-1] % WIDTH == 0
    return whole and weight.dtype == x.dtype in (torch.float32, torch.bfloat16)  # type: ignore[union-attr]


def _fits_add(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, epsilon, variance_size) and x.is_contiguous() and x_residual.is_contiguous()
