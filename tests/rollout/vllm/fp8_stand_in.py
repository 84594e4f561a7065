"""vLLM's FP8 layers on a CPU without AMX, which has no FP8 kernels: ones that multiply by weights times scales stand in for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F


def spread(scales: Tensor) -> Tensor:
    """Each block's scale for each of its elements."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


class Experts:
    """In place of vLLM's kernel of experts: each token by each of its experts."""

    is_monolithic = False
    fused_experts = SimpleNamespace(consumes_expert_mask=False)
    prepare_finalize = SimpleNamespace(topk_indices_dtype=lambda: None)

    def __init__(self, *, moe_quant_config: Any, **_: Any) -> None:
        self._scales = moe_quant_config.w1_scale, moe_quant_config.w2_scale

    def output_is_reduced(self) -> bool:
        return False

    def apply(self, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor, **_: Any) -> Tensor:
        output = torch.zeros(x.shape)
        for row, (chosen, shares) in enumerate(zip(experts.tolist(), weights.float(), strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                up_down = [w[expert].float() * spread(s[expert]) for w, s in zip((w13, w2), self._scales, strict=True)]
                gate, up = F.linear(x[row].float(), up_down[0]).chunk(2)
                output[row] += share * F.linear(F.silu(gate) * up, up_down[1])
        return output.to(x.dtype)


@contextmanager
def fp8_on_a_cpu() -> Iterator[None]:
    """`rollout.quantization=fp8` is not refused, and computes by the stand-in; everything else is vLLM's and ours."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8
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
        patch.object(fp8, "select_fp8_moe_backend", lambda **_: (Fp8MoeBackend.TRITON, TritonExperts)),
        patch.object(fp8, "make_fp8_moe_kernel", Experts),
        patch("aligner.rollout.vllm.sizes.check_quantization"),
    ):
        yield
