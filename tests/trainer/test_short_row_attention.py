"""Attention of short rows in bfloat16 on a CPU: output and gradients beside float64's, nearer to them than those of torch's own kernel or as near."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.trainer import short_row_attention as module
from aligner.trainer.attention_mask import BLOCK, causal_bias
from aligner.trainer.packed_attention import causal_attention
from aligner.trainer.short_row_attention import is_short_row, short_row_attention

DIM, SCALE = 16, 0.2
CASES = {
    "causal": (9, 9, None),
    "fewer queries than keys": (5, 12, None),
    "one": (1, 1, None),
    "a token after many": (1, 40, None),
    "in a window": (30, 40, 8),
    "two blocks of queries": (BLOCK + 30, BLOCK + 50, None),
    "two blocks in a window": (BLOCK + 50, BLOCK + 50, 40),
}


HAS_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def given(rows: int, heads: int, queries: int, keys: int, values: int = DIM) -> list[Tensor]:
    """q, k, v as the model has them: heads beside each other in memory."""
    draw = torch.Generator().manual_seed(queries)
    sizes = ((queries, heads, DIM), (keys, 2, DIM), (keys, 2, values))
    numbers = (3 * torch.randn(rows, *size, generator=draw) for size in sizes)
    return [x.to(torch.bfloat16).transpose(1, 2).requires_grad_() for x in numbers]


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """torch's attention under the whole mask."""
    queries, keys = q.shape[2], k.shape[2]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    if window:
        hidden |= torch.ones_like(hidden).tril(keys - queries - window)
    mask = torch.zeros(queries, keys, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize(("heads", "values", "cached"), [(2, DIM, 1), (6, DIM, 1 << 19), (6, 10, 1 << 19)])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(
    case: str, heads: int, values: int, cached: int, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "bfloat16" and not HAS_BFLOAT16:
        pytest.skip("oneDNN has no bfloat16 products on this CPU")
    monkeypatch.setattr(module, "_has_bfloat16", lambda: products == "bfloat16")
    monkeypatch.setattr(module, "CACHED", cached)
    queries, keys, window = CASES[case]
    own, torchs = (given(3, heads, queries, keys, values) for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in own]
    out, theirs, expected = causal_attention(*own, SCALE, window), plain(*torchs, window), plain(*exact, window)
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = [
        torch.autograd.grad(y, x, grad.to(y.dtype)) for y, x in ((out, own), (theirs, torchs), (expected, exact))
    ]
    spacing = torch.finfo(torch.bfloat16).eps
    for mine, other, right in zip(
        (out, *gradients[0]), (theirs, *gradients[1]), (expected, *gradients[2]), strict=True
    ):
        error, largest = (mine - right).abs().max(), right.abs().max()
        assert mine.dtype == torch.bfloat16 and error <= 2 * spacing * largest + 1e-6
        if values == DIM:  # else torch has no kernel either, and multiplies in float32
            assert (mine - right).abs().mean() <= 1.3 * (other - right).abs().mean() + 1e-6
    with torch.no_grad():
        assert torch.equal(causal_attention(*own, SCALE, window), out)


def test_scores_keep_the_precision_of_float32() -> None:
    """Scores of about 300: in bfloat16 they would be wrong by up to 1, and the weights by a factor."""
    q, k, v = (10 * x.detach() for x in given(2, 2, 20, 20))
    bias = causal_bias(20, 20, 20, None, q)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=SCALE)
    error = (short_row_attention(q, k, v, SCALE, bias) - exact).abs().max() / exact.abs().max()
    rounded = (q @ k.mT).float() * SCALE + bias
    assert error < 2 * torch.finfo(torch.bfloat16).eps
    assert (rounded.softmax(-1).double() @ v.double() - exact).abs().max() / exact.abs().max() > 10 * error


def test_where_it_is_used() -> None:
    q = given(1, 2, 4, 4)[0]
    longest = module.LONGEST if HAS_BFLOAT16 else BLOCK
    assert is_short_row(q, 4) and is_short_row(q, longest)
    assert not is_short_row(q, longest + 1)
    assert not is_short_row(q, 0)
    assert not is_short_row(q.float(), 4) and not is_short_row(q.half(), 4)
    assert not is_short_row(q.to("meta"), 4)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_numbers_of_a_head_that_do_not_lie_beside_each_other(place: int) -> None:
    plainly = [x.detach() for x in given(2, 2, 7, 7)]
    apart = [x.mT.contiguous().mT if number == place else x for number, x in enumerate(plainly)]
    own, beside = (
        [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in each] for each in (apart, plainly)
    )
    assert own[place].stride(-1) != 1
    out, wanted = (causal_attention(*each, SCALE, None) for each in (own, beside))
    assert torch.equal(out, wanted)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    for mine, other in zip(*(torch.autograd.grad(x, y, grad) for x, y in ((out, own), (wanted, beside))), strict=True):
        assert torch.equal(mine, other)
