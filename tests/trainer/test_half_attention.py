"""Attention of short rows in 16 bits on a CPU: torch's own output, and gradients nearer to float64's than those of torch's backward in 16 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.trainer.half_attention import attention

DIM, SCALE = 16, 0.2
CASES = {"causal": (9, 9), "fewer queries than keys": (5, 12), "one": (1, 1), "a token after many": (1, 40)}


def given(rows: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the model has them: heads beside each other in memory."""
    draw = torch.Generator().manual_seed(queries)
    sizes = ((queries, heads), (keys, 2), (keys, 2))
    return [torch.randn(rows, *size, DIM, generator=draw).to(dtype).transpose(1, 2).requires_grad_() for size in sizes]


def mask_of(queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if queries == keys:
        return None
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, -torch.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE, enable_gqa=q.shape[1] != k.shape[1]
    )


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype, heads: int) -> None:
    queries, keys = CASES[case]
    own, torchs = (given(3, heads, queries, keys, dtype) for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in own]
    out, wanted = attention(*own, SCALE, mask_of(queries, keys, dtype)), plain(*torchs, mask_of(queries, keys, dtype))
    expected = plain(*exact, mask_of(queries, keys, torch.float64))
    assert torch.equal(out, wanted)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs, reference = (
        torch.autograd.grad(out, own, weight),
        torch.autograd.grad(wanted, torchs, weight),
        torch.autograd.grad(expected, exact, weight.double()),
    )
    spacing = torch.finfo(dtype).eps
    for mine, other, right in zip(ours, theirs, reference, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        error, largest = (mine - right).abs().max(), right.abs().max()
        assert error <= 2 * spacing * largest + 1e-6
        assert error <= (other - right).abs().max() + spacing * largest


def test_float32_and_no_gradient_are_torchs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.detach() for x in given(2, 6, 7, 7, dtype))
        assert torch.equal(attention(q, k, v, SCALE), plain(q, k, v, None))
    q, k, v = (x.repeat(1, 1, 64, 1) for x in given(1, 6, 9, 9, torch.bfloat16))
    assert "HalfAttention" not in type(attention(q, k, v, SCALE).grad_fn).__name__  # long rows
    with torch.no_grad():
        own = given(2, 6, 7, 7, torch.bfloat16)
        assert not attention(*own, SCALE).requires_grad


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_numbers_of_a_head_that_do_not_lie_beside_each_other(place: int) -> None:
    plainly = [x.detach() for x in given(2, 2, 7, 7, torch.bfloat16)]
    apart = [x.mT.contiguous().mT if number == place else x for number, x in enumerate(plainly)]
    own, torchs = (
        [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in each] for each in (apart, plainly)
    )
    assert own[place].stride(-1) != 1
    out, wanted = attention(*own, SCALE), plain(*torchs, None)
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for mine, other in zip(
        *(torch.autograd.grad(x, y, weight) for x, y in ((out, own), (wanted, torchs))), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)
