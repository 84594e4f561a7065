"""vLLM's matrix product on a CPU: a row's result is the same to the last bit, alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from aligner.rollout.vllm.cpu_single_rows import compute_single_rows_as_two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "columns"), [(64, 96), (896, 1024), (1536, 256)])
def test_a_row_alone_is_the_row_of_a_batch(width: int, columns: int, dtype: torch.dtype) -> None:
    from vllm import _custom_ops as ops

    if torch.cuda.is_available():
        pytest.skip("vLLM's CPU build alone has this product")
    compute_single_rows_as_two()
    compute_single_rows_as_two()  # once is enough
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, width, generator=generator).to(dtype)
    rows = torch.randn(9, width, generator=generator).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype)
    handler = ops.create_onednn_mm(weight.t(), 32)
    together = ops.onednn_mm(handler, rows, bias)
    expected = rows.double() @ weight.double().t() + bias.double()
    assert torch.allclose(together.double(), expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-1)
    for first in (0, 5):
        assert torch.equal(ops.onednn_mm(handler, rows[first : first + 4], bias), together[first : first + 4])
    for row in range(9):
        assert torch.equal(ops.onednn_mm(handler, rows[row : row + 1], bias), together[row : row + 1])
    assert ops.onednn_mm(handler, rows[3][None, None], bias).shape == (1, 1, columns)
    assert ops.onednn_mm(handler, rows[3], bias).shape == (columns,)
