"""Blocks of 128 x 128 as FP8: hand-worked numbers, and vLLM's own reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aligner.reshard.message.quantize import block_scales, quantize_blocks


def bits(fp8: Tensor) -> Tensor:
    return fp8.view(torch.uint8)


def matrices() -> dict[str, Tensor]:
    """Ordinary weights in each dtype, strided ones, ragged edges, zeros, and magnitudes from subnormal to the largest."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(300, 260, generator=draw) * 0.02
    spread = normal * torch.logspace(-6, 6, 260)
    return {
        "float32": normal[:256, :256],
        "bfloat16": normal[:256, :256].bfloat16(),
        "float16": normal[:256, :256].half(),
        "ragged": normal.bfloat16(),
        "one element": normal[:1, :1],
        "transposed": normal.t()[2:130],
        "columns": normal[:, 3:200].bfloat16(),
        "zeros": torch.zeros(128, 256),
        "spread": spread,
        "subnormal": torch.full((128, 128), 1e-40),
        "tiny beside large": torch.cat([torch.full((64, 128), 1e-7), torch.full((64, 128), -3.0)]),
        "large": torch.full((128, 130), 3e38) * torch.linspace(-1, 1, 130),
    }


@pytest.mark.parametrize("name", matrices())
def test_equals_vllm_bit_for_bit(name: str) -> None:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    weight = matrices()[name]
    reference = getattr(per_block_cast_to_fp8, "_torchdynamo_orig_callable", per_block_cast_to_fp8)
    expected, expected_scales = reference(weight)
    fp8, scales = quantize_blocks(weight)
    assert fp8.dtype == expected.dtype == torch.float8_e4m3fn and fp8.is_contiguous()
    assert torch.equal(bits(fp8), bits(expected)) and torch.equal(scales, expected_scales)
    assert torch.equal(block_scales(weight), scales)


def test_by_hand() -> None:
    """amax 7 makes the scale 1/64, so each number times 64 is rounded to 4 significant bits, half to even."""
    weight = torch.zeros(128, 129)
    weight[0, :9] = torch.tensor([7.0, -7.0, 1.0, 17 / 64, 19 / 64, 2**-9 / 64, 2**-10 / 64, 3 * 2**-10 / 64, 0.4375])
    fp8, scales = quantize_blocks(weight)
    assert scales.tolist() == [[1 / 64, torch.tensor(1e-4).div(448).item()]]
    # 17 and 19 lie half-way between 16, 18 and 20; 2^-9 is the smallest subnormal, half of it falls to 0, one and a half rise to 2^-8.
    assert fp8[0, :9].float().tolist() == [448.0, -448.0, 64.0, 16.0, 20.0, 2**-9, 0.0, 2**-8, 28.0]
    assert bits(fp8)[0, :2].tolist() == [0x7E, 0xFE] and not bits(fp8)[1:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_makes_its_whole_block_none(bad: float) -> None:
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    weight[130, 5] = bad
    fp8, scales = quantize_blocks(weight)
    assert scales.isnan().tolist() == [[False, False], [True, False]]
    assert fp8.float().isnan().nonzero().tolist() == [[row, column] for row in range(128, 256) for column in range(128)]


def test_the_error_is_within_half_a_step() -> None:
    """E4M3 has 3 bits behind the leading one: half a step is 1/16 of a number, or 2^-10 of the scale among subnormals."""
    weight = matrices()["float32"]
    fp8, scales = quantize_blocks(weight)
    scale = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (fp8.float() * scale - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, scale * 2**-10) * (1 + 1e-6)).all())
