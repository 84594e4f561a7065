"""Attention of short rows of 16-bit numbers on a CPU: torch's forward, and a backward in float32, which takes half the time there.

torch's kernel for CPUs computes the backward of rows of 64 to 128 tokens in 16 bits at 0.4 of its float32 speed; from 512 tokens on they
are equal, and the copies cost more than they save. What is kept in between are the same tensors, in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256
"""Keys of a row, up to which the backward is in float32."""


class _HalfAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor | None, scale: float
    ) -> Tensor:
        group = q_BNTD.shape[1] // k_BKSD.shape[1]
        out_BNTD, log_sum_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNTD, *(_repeated(group, x, x.dtype) for x in (k_BKSD, v_BKSD)), 0.0, mask_TS is None, attn_mask=mask_TS, scale=scale
        )  # fmt: skip
        ctx.save_for_backward(q_BNTD, k_BKSD, v_BKSD, out_BNTD, log_sum_BNT, mask_TS)
        ctx.scale, ctx.group = scale, group
        return out_BNTD  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BNTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q_BNTD, k_BKSD, v_BKSD, out_BNTD, log_sum_BNT, mask_TS = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BNTD.float(), q_BNTD.float(), *(_repeated(ctx.group, x, torch.float32) for x in (k_BKSD, v_BKSD)),
            out_BNTD.float(), log_sum_BNT, 0.0, mask_TS is None, attn_mask=None if mask_TS is None else mask_TS.float(),
            scale=ctx.scale,
        )  # fmt: skip
        shared = [_sum_of_repeated(ctx.group, grad) if ctx.group > 1 else grad for grad in grads[1:]]
        grad_q, grad_k, grad_v = (grad.to(q_BNTD.dtype) for grad in (grads[0], *shared))
        return grad_q, grad_k, grad_v, None, None


def _repeated(group: int, x_BKSD: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, K x group, S, D] of a data type: each key/value head for every query head that it has; heads stay beside each other in memory."""
    x_BSKGD = x_BKSD.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, group, -1)
    return x_BSKGD.to(dtype).flatten(2, 3).transpose(1, 2)


def _sum_of_repeated(group: int, grad_BNSD: Tensor) -> Tensor:
    """[B, K x group, S, D] -> [B, K, S, D]."""
    return grad_BNSD.transpose(1, 2).unflatten(2, (-1, group)).sum(3).transpose(1, 2)


def attention(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, mask_TS: Tensor | None = None) -> Tensor:
    """torch's scaled dot product attention; of short rows in 16 bits on a CPU the backward is in float32.

    Args:
        q_BNTD: [rows, query heads, T, head_dim]; k_BKSD, v_BKSD: [rows, key/value heads, S, head_dim].
        mask_TS: added to the scores, like q; None: causal, T = S.
    """
    halves = q_BNTD.device.type == "cpu" and q_BNTD.element_size() == 2
    short = 0 < k_BKSD.shape[2] <= LONGEST and q_BNTD.numel() and q_BNTD.shape[-1] == v_BKSD.shape[-1]
    # the kernel reads a head's numbers one after the other, and does not check that they lie so
    beside = all(x.stride(-1) == 1 for x in (q_BNTD, k_BKSD, v_BKSD))
    if halves and short and beside and torch.is_grad_enabled():
        return _HalfAttention.apply(q_BNTD, k_BKSD, v_BKSD, mask_TS, scale)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(
        q_BNTD,
        k_BKSD,
        v_BKSD,
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        scale=scale,
        enable_gqa=q_BNTD.shape[1] != k_BKSD.shape[1],
    )
