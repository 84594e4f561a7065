"""Attention of packed rows beside attention with a dense mask, in float64, with a window and without; its gradients too."""

from __future__ import annotations

import pytest
import torch

from aligner.trainer import packed_attention as packed
from aligner.trainer.packed_attention import packed_attention
from aligner.trainer.prefix_attention import prefix_attention
from tests.trainer.context_on_ranks import SCALE, dense


@pytest.mark.parametrize("window", [None, 1, 3, 6, 40, 256, 300])
@pytest.mark.parametrize("lengths", [(9, 17, 12, 5), (1,), (6, 6, 6), (600, 300), (521, 520, 3)])
def test_beside_a_dense_mask(lengths: tuple[int, ...], window: int | None) -> None:
    """Ragged rows; equal rows, which are views; rows longer than a block of queries."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((sum(lengths), heads, 8) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    wanted = dense(q, k, v, lengths, window)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(wanted, (q, k, v), upstream)
    got = packed_attention(q, k, v, lengths, SCALE, window)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(got, (q, k, v), upstream), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


TREES = [
    ((20, 5, 7, 9, 9), (-1, -1, 0, 0, 0)),
    ((12, 9, 4, 1, 6, 6, 2, 11, 3), (-1, -1, 0, 0, 2, 2, 2, 1, 1)),
    ((300, 270, 530, 2), (-1, 0, 0, -1)),
    ((100, *[100] * 4), (-1, 0, 0, 0, 0)),
]
"""(lengths, parents) of segments: branches of one beginning beside a row; a beginning of a beginning; more than one block of
queries, then padding; equal ones."""


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 40, 256, 300])
@pytest.mark.parametrize(("lengths", "parents"), TREES, ids=str)
def test_shared_segments_beside_a_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    window: int | None,
    by_name: bool,
) -> None:
    """On a CPU, and with the masks by name that CUDA's kernels take."""
    monkeypatch.setattr(packed, "_implements_lower_right", lambda query: by_name)
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((sum(lengths), heads, 8) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    wanted = dense(q, k, v, lengths, window, parents)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(wanted, (q, k, v), upstream)
    got = prefix_attention(q, k, v, lengths, parents, SCALE, window)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for mine, reference in zip(torch.autograd.grad(got, (q, k, v), upstream), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


def test_a_window_by_hand() -> None:
    """Of 4 tokens with a window of 2, token 3 sees 2 and 3: with equal scores, the mean of their values."""
    zeros, value = torch.zeros(4, 1, 4), torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None].expand(4, 1, 4)
    assert packed_attention(zeros, zeros, value, (4,), 1.0, 2)[:, 0].tolist() == [1.0, 5.5, 55.0, 550.0]
