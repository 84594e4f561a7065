"""The fused parts of a layer against torch's and transformers' expressions in float64, and by finite differences; in parts of few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from aligner.trainer import fused
from aligner.trainer.fused import gated, rms_norm, rotate

HEADS, HEAD_DIM, WIDTH = 3, 8, 6


@pytest.fixture(params=[1, 20, 1 << 18], ids=["a row at a time", "some rows", "at once"], autouse=True)
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CACHED", request.param)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def tables(tokens: int, turned: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin as `rotate` takes them, [T, 1, turned]; the angles [T, turned]."""
    half = torch.outer(torch.arange(tokens).double(), 0.7 ** torch.arange(turned // 2))
    cos, sin = torch.cat([half.cos(), half.cos()], -1), torch.cat([-half.sin(), half.sin()], -1)
    return cos[:, None], sin[:, None], torch.cat([half, half], -1)


def check(own: Callable[..., Tensor], wanted: Callable[..., Tensor], *given: Tensor) -> None:
    """Values, gradients of a random sum, and gradients by finite differences."""
    out, expected = own(*given), wanted(*given)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((out * weight).sum(), given), gradients(expected, weight, given), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    twice = own(*given)
    twice *= 2  # as a model may: autograd forbids it of a view that a function returns
    torch.testing.assert_close(twice, 2 * expected, rtol=1e-12, atol=1e-12)
    torch.autograd.grad(twice.sum(), given)
    assert torch.autograd.gradcheck(own, given)


def gradients(expected: Tensor, weight: Tensor, given: tuple[Tensor, ...]) -> Iterator[Tensor]:
    yield from torch.autograd.grad((expected * weight).sum(), given)


@pytest.mark.parametrize("shape", [(7, 1, WIDTH), (5, 1, HEADS, WIDTH), (1, WIDTH), (0, WIDTH)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    check(
        lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: F.rms_norm(x, w.shape, w, 1e-3), normal(*shape), normal(WIDTH)
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(7, 1, 2 * WIDTH), (9, 2 * WIDTH), (0, 2 * WIDTH)], ids=str)
def test_gated(shape: tuple[int, ...], activation: str) -> None:
    def wanted(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    check(lambda both: gated(both, activation), wanted, normal(*shape))


@pytest.mark.parametrize("turned", [HEAD_DIM, 4])
def test_rotate_as_transformers_does(turned: int) -> None:
    """Phi-3 turns a part of a head."""
    cos, sin, angle = tables(7, turned)

    def wanted(x: Tensor) -> Tensor:
        heads_first = x[..., :turned].transpose(0, 1)[None]
        out, _ = apply_rotary_pos_emb(heads_first, heads_first, angle.cos()[None], angle.sin()[None])
        return torch.cat([out[0].transpose(0, 1), x[..., turned:]], -1)

    check(lambda x: rotate(x, cos, sin), wanted, normal(7, HEADS, HEAD_DIM))


def test_views_that_projections_are_split_into() -> None:
    """Keys lie between queries and values in the projection's output."""
    cos, sin, _ = (one.float() for one in tables(7, HEAD_DIM))
    rows = normal(7, 1, (HEADS + 2) * HEAD_DIM).float()
    key = rows[..., HEADS * HEAD_DIM : (HEADS + 1) * HEAD_DIM].view(7, 1, HEAD_DIM)
    assert not key.is_contiguous() and torch.equal(rotate(key, cos, sin), rotate(key.contiguous(), cos, sin))
    weight = torch.ones(HEAD_DIM)
    assert torch.equal(rms_norm(key, weight, 1e-6), rms_norm(key.contiguous(), weight, 1e-6))


def test_bfloat16_is_normed_in_float32() -> None:
    x, weight = normal(40, WIDTH).bfloat16(), normal(WIDTH).bfloat16()
    expected = F.rms_norm(x.double(), weight.shape, weight.double(), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), expected.bfloat16())
