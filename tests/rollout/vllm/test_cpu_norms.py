"""The engine's norms on a CPU: the kernel is used where it fits, and computes what float64 does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.rollout.vllm import cpu_norms

EPSILON = 1e-6


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    import vllm._custom_ops  # noqa: F401


def exact(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("hidden", [16, 32, 64, 128, 384, 576])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_it_is_the_norm(hidden: int, rows: int) -> None:
    torch.manual_seed(hidden + rows)
    x, residual, weight = 3 * torch.randn(rows, hidden), torch.randn(rows, hidden), torch.randn(hidden)
    assert (cpu_norms.rms_norm(x, weight, EPSILON) - exact(x, weight)).abs().max() < 1e-5
    whole = x + residual
    normed, summed = cpu_norms.fused_add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(summed, whole)
    assert (normed - exact(whole, weight)).abs().max() < 1e-5


@pytest.mark.parametrize("hidden", [16, 384])
def test_in_bfloat16_it_rounds_once(hidden: int) -> None:
    """Of a sum, the rounded one is normed, which is what the next layer and training have."""
    torch.manual_seed(hidden)
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in ((7, hidden), (7, hidden), (hidden,)))
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    normed = cpu_norms.rms_norm(x, weight, EPSILON)
    assert ((normed - exact(x, weight)).abs() <= 1.01 * half_a_unit * exact(x, weight).abs()).all()
    whole = (x.double() + residual.double()).bfloat16()
    normed, summed = cpu_norms.fused_add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(summed, whole)
    assert ((normed - exact(whole, weight)).abs() <= 1.2 * half_a_unit * exact(whole, weight).abs()).all()


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_that_are_columns_of_a_wider_tensor(heads: int) -> None:
    """Query and key norms see a view of the fused projection: [tokens, heads, head_dim] of rows that are further apart."""
    qkv = torch.randn(5, 4 * 32)
    columns, weight = qkv[:, 32 : 32 + 32 * heads].view(5, heads, 32), torch.randn(32)
    before = qkv.clone()
    found = cpu_norms.rms_norm(columns, weight, EPSILON)
    assert found.shape == (5, heads, 32) and (found - exact(columns, weight)).abs().max() < 1e-5
    assert torch.equal(qkv, before)


def test_the_engine_prefers_it_where_it_fits(loaded: tuple[Any, Any, Any]) -> None:
    from vllm import ir

    x, weight = torch.randn(3, 64), torch.randn(64)
    assert ir.ops.rms_norm.dispatch(x, weight, EPSILON).provider == cpu_norms.PROVIDER
    assert ir.ops.fused_add_rms_norm.dispatch(x, x, weight, EPSILON).provider == cpu_norms.PROVIDER
    assert ir.ops.fused_add_rms_norm.dispatch(x.T, x.T, torch.randn(3), EPSILON).provider == "native"
    assert ir.ops.rms_norm.dispatch(x.bfloat16(), weight.bfloat16(), EPSILON).provider == cpu_norms.PROVIDER
    assert ir.ops.rms_norm.dispatch(x.bfloat16(), weight, EPSILON).provider == "native"
    assert ir.ops.rms_norm.dispatch(x.half(), weight.half(), EPSILON).provider == "native"
    assert ir.ops.rms_norm.dispatch(x, None, EPSILON).provider == "native"
    assert ir.ops.rms_norm.dispatch(torch.randn(3, 100), torch.randn(100), EPSILON).provider == "native"
