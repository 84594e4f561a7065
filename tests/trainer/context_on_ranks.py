"""What ranks do in the tests of attention over context ranks: outputs and gradients beside attention with a dense mask, in
float64, and what a layer keeps for its backward."""

from __future__ import annotations

import weakref
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from aligner.spmd.world import World
from aligner.trainer.context import split_rows, tokens_per_rank
from aligner.trainer.megatron import context_attention as context_attention_file
from aligner.trainer.megatron.context_attention import Gathered, context_attention

SCALE = 0.3


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """Attention over all tokens of all rows [S, heads, head_dim], written out; within a window as in transformers."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (row[:, None] == row) & (torch.arange(len(row))[:, None] >= torch.arange(len(row)))
    if window is not None:
        seen &= torch.arange(len(row)) > torch.arange(len(row))[:, None] - window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * SCALE
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weight, v).flatten(1)


def check(
    lengths: tuple[int, ...], multiple_of: int, heads: tuple[int, int], drop: bool, window: int | None = None
) -> None:
    group = dist.group.WORLD
    assert group is not None
    ranks, rank, total = group.size(), group.rank(), sum(lengths)
    generator = torch.Generator().manual_seed(total)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    whole = [random(total, n, 8).requires_grad_() for n in (heads[0], heads[1], heads[1])]
    upstream = random(total, heads[0] * 8)
    wanted = dense(*whole, lengths, window)
    wanted.backward(upstream)
    mine, held = split_rows(lengths, ranks).token_indices(rank), tokens_per_rank(lengths, ranks, multiple_of)
    garbage = held - len(mine)

    def own(x: Tensor) -> Tensor:  # what stands at the padding must reach nothing
        return torch.cat([x.detach()[mine], torch.full((garbage, *x.shape[1:]), 1e9, dtype=x.dtype)])

    local = [own(x).requires_grad_() for x in whole]
    with torch.no_grad():
        unseen = context_attention(*local, lengths, SCALE, group, drop, window)
    got = context_attention(*local, lengths, SCALE, group, drop, window)
    assert torch.equal(got, unseen)
    torch.testing.assert_close(got[: len(mine)], wanted[mine].detach(), rtol=1e-10, atol=1e-12)
    assert not got[len(mine) :].any()
    got.backward(own(upstream))
    for x, reference in zip(local, whole, strict=True):
        assert reference.grad is not None
        if x is local[0] and not len(mine):  # no query of this rank
            assert x.grad is None
            continue
        assert x.grad is not None
        torch.testing.assert_close(x.grad[: len(mine)], reference.grad[mine], rtol=1e-9, atol=1e-11)
        assert not x.grad[len(mine) :].any()


def check_kept(world: World) -> None:
    """What was gathered is gone after the forward, and after the backward; without `drop` it stays for the backward."""
    group = dist.group.WORLD
    assert group is not None
    filled, inner = [], Gathered.fill

    def noted(self: Gathered, *tensors: Tensor) -> None:
        inner(self, *tensors)
        filled.extend(weakref.ref(rows.untyped_storage()) for rows in self.rows)

    Gathered.fill = noted  # type: ignore[method-assign]
    for heads, lengths in ((4, (700, 100)), (2, (300, 300))):  # views of what was gathered, and copies
        for drop in (True, False):
            filled.clear()
            held = sum(lengths) // group.size() + 1
            local = [torch.randn(held, n, 16).requires_grad_() for n in (4, heads, heads)]
            out = context_attention(*local, lengths, SCALE, group, drop)
            assert len(filled) == 2
            assert all((storage() is None) == drop for storage in filled), (lengths, drop)
            out.sum().backward()
            assert len(filled) == (4 if drop else 2)
            assert not any(storage() for storage in filled)
    Gathered.fill = inner  # type: ignore[method-assign]


def check_rows(world: World, lengths: tuple[int, ...], multiple_of: int) -> None:
    """Rows of these lengths, as on a CPU and as with CUDA."""
    check(lengths, multiple_of, (4, 2), drop=True)
    check(lengths, 1, (3, 3), drop=False)
    for window in (1, 3, 40, 300):
        check(lengths, 1, (4, 2), drop=True, window=window)
    check(lengths, 1, (4, 2), drop=False, window=7)
    # as with CUDA: a piece is one call, its mask is known by its name
    with mock.patch.multiple(
        context_attention_file,
        _max_queries=lambda query: 0,
        _bias=lambda call, plan, query: causal_lower_right(call.queries, call.keys),
    ):
        check(lengths, 1, (4, 2), drop=True)
