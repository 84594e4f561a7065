"""The Triton kernel of `quantize_blocks`: one program takes one block, finds its largest magnitude and casts it.

The cast to E4M3 is done in integers: Triton has it for sm_89 and later only, and its interpreter truncates. Divisions are
rounded as IEEE says, which Triton's own are not, so that the bits are those of the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligner.reshard.plan.block_scales import BLOCK

_BLOCK = tl.constexpr(BLOCK)
_FP8_MAX = tl.constexpr(448.0)
_LEAST_AMAX = tl.constexpr(1e-4)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `aligner.reshard.message.quantize.quantize_blocks`."""
    fp8 = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    return fp8, _launch(weight, fp8.view(torch.uint8), True)


def scales(weight: Tensor) -> Tensor:
    """The scales alone."""
    return _launch(weight, torch.empty(0, dtype=torch.uint8, device=weight.device), False)


def _launch(weight: Tensor, fp8: Tensor, casts: bool) -> Tensor:
    rows, columns = weight.shape
    made = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), device=weight.device)
    if made.numel():
        # A fused multiply-add would round once where the CPU rounds twice.
        _quantize[(made.numel(),)](
            weight, fp8, made, rows, columns, *weight.stride(), CASTS=casts, num_warps=8, enable_fp_fusion=False
        )
    return made


@triton.jit
def _to_e4m3(value: tl.tensor) -> tl.tensor:
    """Bits of a float32 rounded to E4M3, to nearest, ties to even; beyond 464 and NaN: NaN."""
    bits = value.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Below 2^-6 numbers are subnormal, in steps of 2^-9: the last place of a float32 at 2^14.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = (magnitude - 0x3C000000 + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    rounded = tl.where(magnitude < 0x3C800000, small, rounded)
    return sign | tl.where(magnitude > 0x43E80000, 0x7F, rounded)


@triton.jit
def _quantize(
    weight: tl.tensor, fp8: tl.tensor, scales: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, row_stride: tl.tensor, column_stride: tl.tensor, CASTS: tl.constexpr,
) -> None:  # fmt: skip
    """One block."""
    across = tl.cdiv(columns, _BLOCK)
    block = tl.program_id(0)
    row = (block // across * _BLOCK + tl.arange(0, _BLOCK)).to(tl.int64)[:, None]
    column = (block % across * _BLOCK + tl.arange(0, _BLOCK)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(weight + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    # In integers, in whose order magnitudes stand, with NaN above infinity: a maximum of floats may leave a NaN out.
    largest = tl.max(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    amax = tl.maximum(largest.to(tl.float32, bitcast=True), _LEAST_AMAX)
    scale = tl.where(largest < 0x7F800000, tl.div_rn(amax, _FP8_MAX), float("nan"))
    tl.store(scales + block, scale)
    if CASTS:
        bits = _to_e4m3(value * tl.div_rn(1.0, scale))
        tl.store(fp8 + row * columns + column, bits.to(tl.uint8), mask=inside)
