"""Attention of short rows in bfloat16 on a CPU as batched matrix products, which oneDNN computes.

torch's own kernel multiplies one block of one head at a time, which for rows of 77 tokens takes nearly three times as long forward and
backward. oneDNN rounds a product to bfloat16, so a second product returns what the first one lost: scores and their
gradients have the precision of float32, as in torch's kernel. A CPU on which oneDNN has no bfloat16 multiplies in float32, which is faster
there than torch's backward in 16 bits. Of long rows torch's kernel is as fast, since it leaves out what is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aligner.trainer.attention_mask import BLOCK
from aligner.trainer.products import shaped

LONGEST = 2 * BLOCK
"""Keys of a row, up to which its attention is computed here: 1.4 times as fast as torch's; of 1,024 keys it is the same."""
CACHED = 1 << 19
"""Scores computed at a time (2 MiB), which stay in the cache."""


class _ShortRows(torch.autograd.Function):
    """H in shapes: rows x key/value heads; GT: the queries of all the heads that share a key/value head."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_TS: Tensor, scale: float
    ) -> Tensor:
        k_HSD, v_HSD = k_BKSD.flatten(0, 1), v_BKSD.flatten(0, 1)
        q_HGTD = q_BNTD.reshape(len(k_HSD), -1, q_BNTD.shape[-1])
        out_HGTD = q_HGTD.new_empty(*q_HGTD.shape[:2], v_HSD.shape[-1])
        for heads in _parts(q_HGTD, k_HSD):
            weight = _weights(q_HGTD[heads], k_HSD[heads], mask_TS, scale)
            _write_product(out_HGTD[heads], weight, v_HSD[heads])
        ctx.save_for_backward(q_BNTD, k_BKSD, v_BKSD, mask_TS)
        ctx.scale = scale
        return shaped(out_HGTD, *q_BNTD.shape[:-1], v_HSD.shape[-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_BNTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q_BNTD, k_BKSD, v_BKSD, mask_TS = ctx.saved_tensors
        k_HSD, v_HSD = k_BKSD.flatten(0, 1), v_BKSD.flatten(0, 1)
        q_HGTD, grad_HGTD = (x.reshape(len(k_HSD), -1, x.shape[-1]) for x in (q_BNTD, grad_BNTD))
        of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_HGTD, k_HSD, v_HSD))
        for heads in _parts(q_HGTD, k_HSD):
            q, k, v, grad = q_HGTD[heads], k_HSD[heads], v_HSD[heads], grad_HGTD[heads]
            weight = _weights(q, k, mask_TS, ctx.scale)
            _write_product(of_v[heads], weight.mT, grad)
            of_weight = _float32_product(grad, v.mT)
            of_score = torch._softmax_backward_data(of_weight, weight, -1, weight.dtype).mul_(ctx.scale)
            of_score = _factor(of_score)
            _write_product(of_q[heads], of_score, k)
            _write_product(of_k[heads], of_score.mT, q)
        return of_q.view(q_BNTD.shape), of_k.view(k_BKSD.shape), of_v.view(v_BKSD.shape), None, None


def _parts(q_HGTD: Tensor, k_HSD: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // (q_HGTD.shape[1] * k_HSD.shape[1]))
    return (slice(at, at + step) for at in range(0, len(k_HSD), step))


def _weights(q_HGTD: Tensor, k_HSD: Tensor, mask_TS: Tensor, scale: float) -> Tensor:
    """[H, GT, S] float32: how much of each value a query takes."""
    score = _float32_product(q_HGTD, k_HSD.mT).mul_(scale)
    score.unflatten(1, (-1, len(mask_TS))).add_(mask_TS)
    return score.softmax(-1)


def _float32_product(left_HMD: Tensor, right_HDN: Tensor) -> Tensor:
    """left @ right of bfloat16 matrices to 2^-17: the product in bfloat16, and in another one what was rounded off."""
    if not _has_bfloat16():
        return torch.bmm(left_HMD.float(), right_HDN.float())
    rounded_HMN = torch.bmm(left_HMD, right_HDN)
    rest_HMN = torch.baddbmm(rounded_HMN, left_HMD, right_HDN, beta=-1)
    return rounded_HMN.float().add_(rest_HMN)


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _factor(matrix: Tensor) -> Tensor:
    """A float32 matrix as it is multiplied."""
    return matrix.bfloat16() if _has_bfloat16() else matrix


def _write_product(out_HMN: Tensor, left_HMD: Tensor, right_HDN: Tensor) -> None:
    """out = left @ right in bfloat16."""
    if _has_bfloat16():
        torch.bmm(_factor(left_HMD), right_HDN, out=out_HMN)
    else:
        out_HMN.copy_(torch.bmm(left_HMD.float(), right_HDN.float()))


def is_short_row(q_BNTD: Tensor, keys: int) -> bool:
    """Whether `short_row_attention` is the faster: for rows of at most LONGEST keys in bfloat16 on a CPU."""
    on_cpu = q_BNTD.device.type == "cpu" and q_BNTD.dtype is torch.bfloat16 and q_BNTD.numel() > 0
    return on_cpu and 0 < keys <= (LONGEST if _has_bfloat16() else BLOCK)


def short_row_attention(q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, mask_TS: Tensor) -> Tensor:
    """Scaled dot product attention by products of whole heads.

    Args:
        q_BNTD: [rows, query heads, T, head_dim] bfloat16; k_BKSD, v_BKSD: [rows, key/value heads, S, head_dim].
        mask_TS: added to the scores, like q.

    Returns:
        Like q_BNTD, of the values' head_dim.
    """
    return _ShortRows.apply(q_BNTD, k_BKSD, v_BKSD, mask_TS, scale)  # type: ignore[no-any-return]
