"""Weights as 8-bit floats with a scale for each block of 128 x 128, as DeepSeek-V3's checkpoints and vLLM's block FP8 have them."""

from __future__ import annotations

import torch
from torch import Tensor

from aligner.reshard.message.kernels import has_kernels
from aligner.reshard.plan.block_scales import BLOCK

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""
LEAST_AMAX = 1e-4
"""A block's largest magnitude counts as at least this, as in DeepGEMM and vLLM: so a block of zeros has a scale."""


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in float8_e4m3fn, and its scales: `weight` is about `fp8 * scale`, block by block.

    scale = max(amax, 1e-4) / 448, fp8 = round(weight * (1 / scale)) to nearest, ties to even, all in float32: bit for bit what
    DeepGEMM's `per_block_cast_to_fp8` gives (https://github.com/deepseek-ai/DeepGEMM, deep_gemm/utils/math.py), which vLLM has too.
    A block with a NaN or an infinity is NaN as a whole, its scale too, so that no proof or log-probability takes it for a number.

    Args:
        weight: (rows, columns) float32, bfloat16 or float16, any strides. Blocks at the lower and right edge may be smaller.

    Returns:
        (rows, columns) float8_e4m3fn and (ceil(rows / 128), ceil(columns / 128)) float32, both contiguous.
    """
    if has_kernels(weight.device):
        from aligner.reshard.message.quantize_triton import quantize

        return quantize(weight)
    return quantize_by_torch(weight)


def block_scales(weight: Tensor) -> Tensor:
    """The scales alone of `quantize_blocks`."""
    if has_kernels(weight.device):
        from aligner.reshard.message.quantize_triton import scales

        return scales(weight)
    return _scales_by_torch(_in_blocks(weight))


def quantize_by_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` by torch's own operations: the reference of the Triton kernel, and what a CPU takes."""
    rows, columns = weight.shape
    blocks = _in_blocks(weight)
    scales = _scales_by_torch(blocks)
    scaled = blocks * (1.0 / scales)[:, None, :, None]
    fp8 = scaled.to(torch.float8_e4m3fn).view(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)
    return fp8[:rows, :columns].contiguous(), scales


def _in_blocks(weight: Tensor) -> Tensor:
    """(rows of blocks, 128, columns of blocks, 128) float32, filled up with zeros."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK, device=weight.device)
    padded[:rows, :columns] = weight
    return padded.view(down, BLOCK, across, BLOCK)


def _scales_by_torch(blocks: Tensor) -> Tensor:
    amax = blocks.abs().amax(dim=(1, 3))
    return torch.where(amax.isfinite(), amax.clamp(LEAST_AMAX) / FP8_MAX, torch.nan)
