"""What the proof of a packed linear layer notices, on vLLM's own kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import vllm._custom_ops as ops
from torch import Tensor

from aligner.rollout.vllm.packing import EXACT_PROBE_PRODUCTS, probes_for

SMALL = (96, 64)
"""All of it is exact."""
SHAPES = [SMALL, (512, 768), (3000, 512), (64, 5000)]
ROUNDS = 40


def weights(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes."""
    draw = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw) ** 4).to(dtype)


def kernel(weight: Tensor) -> Callable[[Tensor], Tensor]:
    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def held(weight: Tensor, multiply: Callable[[Tensor], Tensor], round_: int) -> bool:
    probes = probes_for(*weight.shape, weight.dtype, round_, EXACT_PROBE_PRODUCTS)
    return probes.held(multiply(probes.vectors), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_of_the_same_weights_is_right_in_every_round(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    multiply = kernel(weight)
    assert all(held(weight, multiply, round_) for round_ in range(ROUNDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_columns_move_on_until_all_were_read(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One element off by one bit, which no random vector shows: in one of the rounds it is read."""
    weight = weights(shape, dtype)
    wrong = weight.clone()
    wrong.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[shape[0] // 2, shape[1] - 1] ^= 1
    multiply, rounds = kernel(wrong), -(-shape[1] // 8)
    assert not all(held(weight, multiply, round_) for round_ in range(rounds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != SMALL])
@pytest.mark.parametrize("what", ["half a row", "two rows exchanged", "of the step before"])
def test_random_vectors_see_what_the_exact_columns_do_not(
    what: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Whatever column is exact in a round, there it is right."""
    weight = weights(shape, dtype)
    for round_ in range(3):
        wrong = weight.clone()
        if what == "half a row":
            row = int(weight.float().norm(dim=1).argmax())
            wrong[row, shape[1] // 2 :] *= -1
        elif what == "two rows exchanged":
            first, second = weight.float().norm(dim=1).topk(2).indices.tolist()
            wrong[[first, second]] = weight[[second, first]]
        else:
            wrong = (weight * 1.01).to(dtype)
        exact = probes_for(*shape, dtype, round_, EXACT_PROBE_PRODUCTS).exact
        assert exact.stop - exact.start < shape[1]
        wrong[:, exact] = weight[:, exact]
        assert not held(weight, kernel(wrong), round_)
