"""Matrix products by oneDNN and by torch's choice against float64, of matrices however they lie in memory; linear layers' gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aligner.trainer import products
from aligner.trainer.products import add_product, grouped_linear, linear, product


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"], autouse=True)
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


WAYS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": normal,
    "columns": lambda m, n: normal(n, m).T,
    "a slice of wider rows": lambda m, n: normal(m, n + 5)[:, 2 : n + 2],
    "every other row": lambda m, n: normal(2 * m, n)[::2],
    "every other column": lambda m, n: normal(m, 2 * n)[:, ::2],
    "one number": lambda m, n: torch.tensor(0.5).expand(m, n),
    "one row": lambda m, n: normal(n).expand(m, n),
    "one column": lambda m, n: normal(m, 1).expand(m, n),
    "a parameter": lambda m, n: torch.nn.Parameter(normal(m, n)),
}


@pytest.mark.parametrize("left", WAYS)
@pytest.mark.parametrize("right", WAYS)
def test_product(left: str, right: str) -> None:
    for rows, inner, columns in ((33, 20, 17), (1, 7, 5), (4, 1, 3), (6, 9, 1), (40, 30, 2)):
        a, b = WAYS[left](rows, inner), WAYS[right](inner, columns)
        expected = a.detach().double() @ b.detach().double()
        total = normal(rows, columns)
        before = total.double()
        with torch.no_grad():
            torch.testing.assert_close(product(a, b).double(), expected, rtol=1e-5, atol=1e-5)
            add_product(total, a, b)
        torch.testing.assert_close(total.double(), before + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    out = product(normal(rows, inner), normal(inner, columns))
    assert torch.equal(out, torch.zeros(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    a, b = normal(5, 4, dtype=dtype), normal(4, 3, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_added_in_other_types_is_not_rounded_before(dtype: torch.dtype) -> None:
    a, b, total = normal(5, 40, dtype=dtype), normal(40, 3, dtype=dtype), normal(5, 3, dtype=dtype)
    expected = total.addmm(a, b)
    add_product(total, a, b)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("shape", [(7, 6), (5, 1, 6), (2, 3, 6), (0, 1, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    given = [normal(*shape), normal(4, 6), *[normal(4)] * bias]
    own = [one.clone().requires_grad_() for one in given]
    theirs = [one.double().requires_grad_() for one in given]
    out, expected = linear(*own), F.linear(*theirs)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = normal(*out.shape)
    for loss in (lambda x: x.sum(), lambda x: (x * weight).sum()):  # of a sum's gradient every number is one
        grads = torch.autograd.grad(loss(out), own, retain_graph=True)
        wanted = torch.autograd.grad(loss(expected), theirs, retain_graph=True)
        for mine, reference in zip(grads, wanted, strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


def test_linear_of_a_frozen_weight() -> None:
    x, weight = normal(3, 6).requires_grad_(), normal(4, 6)
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), [x])
    torch.testing.assert_close(grad, weight.sum(0).expand(3, 6))


@pytest.mark.parametrize("rows", [(3, 0, 4, 1), (0, 0, 0, 8), (2, 1, 2, 1), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_linear(rows: tuple[int, ...], transposed: bool) -> None:
    given = [normal(8, 6), normal(4, 6, 5) if transposed else normal(4, 5, 6)]
    own = [one.clone().requires_grad_() for one in given]
    theirs = [one.double().requires_grad_() for one in given]
    matrices = [one[1] if transposed else one[1].transpose(1, 2) for one in (own, theirs)]
    out = grouped_linear(own[0], matrices[0], rows)
    parts = theirs[0].split([*rows, 8 - sum(rows)])
    expected = torch.cat(
        [*(x @ one for x, one in zip(parts, matrices[1], strict=False)), torch.zeros(len(parts[-1]), 5)]
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weight = normal(8, 5)
    for loss in (lambda x: x.sum(), lambda x: (x * weight).sum()):
        grads = torch.autograd.grad(loss(out), own, retain_graph=True)
        wanted = torch.autograd.grad(loss(expected), theirs, retain_graph=True)
        for mine, reference in zip(grads, wanted, strict=True):
            torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_may_be_changed_in_place(dtype: torch.dtype, bias: bool) -> None:
    x, weight, offset = (normal(*shape).to(dtype).requires_grad_() for shape in ((2, 3, 6), (4, 6), (4,)))
    given = [x, weight, *([offset] if bias else [])]
    out = linear(*given)
    out *= 2
    grads = torch.autograd.grad(out.sum(), given)
    wanted = torch.autograd.grad((2 * F.linear(*given)).sum(), given)
    torch.testing.assert_close(grads, wanted)
