"""vLLM's FP8 layers on a CPU without AMX, which has no FP8 kernel: one that multiplies by weights times scales stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor


def spread(scales: Tensor) -> Tensor:
    """Each block's scale for each of its elements."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


@contextmanager
def fp8_on_a_cpu() -> Iterator[None]:
    """`rollout.quantization=fp8` is not refused, and computes by the stand-in; everything else is vLLM's and ours."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    class Multiplied(linear.TritonFp8BlockScaledMMKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: Any = None) -> tuple[bool, None]:
            return True, None

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            return A.float() @ (B.float() * spread(Bs)).t()

    with (
        patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [Multiplied]}),
        patch("aligner.rollout.vllm.sizes.check_quantization"),
    ):
        yield
