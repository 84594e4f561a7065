"""Experts as two stacked weights, multiplied in one kernel each (`torch.nn.functional.grouped_mm`) instead of expert by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from aligner.trainer.fused import gated
from aligner.trainer.megatron.cpu import parameter_device

ALIGNED = 8
"""An expert's rows are filled up to a multiple of this with zeros: CUDA's kernel for the weights' gradients wants 16 bytes."""


class GroupedExperts(MegatronModule):
    """This rank's experts in the place of Megatron's `SequentialMLP`: the same arithmetic over weights [experts, out, in].

    Megatron's own `GroupedMLP` needs a library of CUDA kernels beside torch.
    """

    weight1: Tensor
    """[experts, 2 ffn / tensor, hidden]: gate and up."""
    weight2: Tensor
    """[experts, hidden, ffn / tensor]: down."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        *,
        pg_collection: Any,
        activation: str,
        name: str | None = None,
    ) -> None:
        """
        Args:
            activation: see `gated`.
            name: what Megatron-core 0.19 calls the module; not used.
        """
        super().__init__(config=config)
        self.num_local_experts, self.activation = num_local_experts, activation
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        for name, shape, dimension in (
            ("weight1", (num_local_experts, 2 * width, config.hidden_size), 1),
            ("weight2", (num_local_experts, config.hidden_size, width), 2),
        ):
            weight: Any = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=parameter_device()))
            # what Megatron's linear layers say of an expert's weight: how it is cut, and over which ranks its gradient is summed
            weight.tensor_model_parallel = True
            weight.partition_dim, weight.partition_stride = dimension, 1
            weight.allreduce = config.expert_model_parallel_size == 1
            setattr(self, name, weight)

    def forward(self, hidden_SH: Tensor, tokens_per_expert: Any, prob_S: Tensor) -> tuple[Tensor, None]:
        """Rows sorted by expert -> (their experts' outputs, weighted by the router's probabilities; no bias).

        Args:
            hidden_SH: [S, hidden].
            tokens_per_expert: rows of each expert, on the host.
            prob_S: [S].
        """
        counts = torch.as_tensor(tokens_per_expert, device="cpu", dtype=torch.long)
        place_S, ends_E = _aligned_places(counts, ALIGNED)
        rows, device = int(ends_E[-1]), hidden_SH.device
        offsets = ends_E.to(device, torch.int32, non_blocking=True)
        exact = rows == len(hidden_SH)
        place_S = place_S.to(device, non_blocking=True)
        padded = hidden_SH if exact else hidden_SH.new_zeros(rows, hidden_SH.shape[1]).index_copy(0, place_S, hidden_SH)
        prob = prob_S if exact else prob_S.new_zeros(rows).index_copy(0, place_S, prob_S)
        inner = gated(F.grouped_mm(padded, self.weight1.transpose(-2, -1), offs=offsets), self.activation)
        inner = (inner * prob.unsqueeze(-1)).to(inner.dtype)
        out = F.grouped_mm(inner, self.weight2.transpose(-2, -1), offs=offsets)
        if out.requires_grad:  # the kernel's backward takes no expanded gradients, such as a sum's
            out.register_hook(Tensor.contiguous)
        return (out if exact else out.index_select(0, place_S)), None


def _aligned_places(counts: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """(place of each row once every expert's rows are filled up to a multiple, where each expert's end); one row at least,
    since the kernel takes no empty matrices."""
    filled = -(-counts // multiple) * multiple
    if not filled.any():
        filled = filled.clone()
        filled[0] = multiple
    ends = filled.cumsum(0)
    shift = ends - filled - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + torch.repeat_interleave(shift, counts), ends
