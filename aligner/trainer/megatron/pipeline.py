"""Microbatches through Megatron's pipeline schedules: readouts on the last stage, or gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from aligner.trainer.engine import MicrobatchLoss
from aligner.trainer.megatron.attention import KeptTokens
from aligner.trainer.megatron.model import ShardedModel
from aligner.trainer.output_layer import PackedOutput
from aligner.trainer.packing import Packed
from aligner.trainer.readout import Readout


class Pipeline:
    """Runs packed microbatches through one role's model."""

    def __init__(
        self,
        model: ShardedModel,
        groups: ProcessGroupCollection,
        readout: Readout,
        vocab: int,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            vocab: unpadded vocabulary size.
            progress: called at each microbatch.
        """
        self.model, self.groups, self.readout, self.vocab, self.progress = model, groups, readout, vocab, progress

    def forward(self, packed: Sequence[Packed]) -> list[Tensor]:
        """Forward only. Returns the first readout of each microbatch on the last stage; [] on the others."""
        results: dict[int, Tensor] = {}

        def collect(number: int, readouts: dict[str, Tensor]) -> Tensor:
            results[number] = next(iter(readouts.values()))
            return results[number].sum()

        with torch.no_grad():
            self._run(self.model.chunks, packed, collect, forward_only=True)
        return [results[number] for number in sorted(results)]

    def backward(self, wrapped: list[Any], packed: Sequence[Packed], loss: MicrobatchLoss) -> None:
        """Forward and backward of every microbatch, then the gradient reduction over the role's ranks."""
        self._run(wrapped, packed, loss, forward_only=False)

    def _run(self, chunks: Sequence[Any], packed: Sequence[Packed], loss: MicrobatchLoss, forward_only: bool) -> None:
        def forward_step(iterator: Any, module: Any) -> Any:
            self.progress()
            number, batch = next(iterator)
            self.model.rotary.positions_T = batch.positions_T
            kept = None if batch.kept_K is None else KeptTokens(batch.kept_K)
            output = module(batch.tokens_T[None], batch.positions_T[None], batch.segments_S2, packed_seq_params=kept)

            def loss_of(output_1KX: Tensor) -> Any:
                self.progress()
                readouts = self.readout(self._head(output_1KX[0]), batch, first_only=forward_only)
                value = loss(number, self._joined(readouts))
                # with three values Megatron neither averages over microbatches nor scales by data-parallel ranks
                return value, torch.zeros((), dtype=torch.int, device=value.device), {}

            return output, loss_of

        stages, is_virtual = self.groups.pp.size(), len(chunks) > 1
        extra = {"p2p_communicator": P2PCommunicator(self.groups.pp, self.model.config)} if stages > 1 else {}
        iterators = [iter(enumerate(packed)) for _ in chunks]
        get_forward_backward_func(pp_size=stages, vp_size=len(chunks) if is_virtual else None)(
            forward_step_func=forward_step,
            data_iterator=iterators if is_virtual else iterators[0],
            model=list(chunks) if is_virtual else chunks[0],
            num_microbatches=len(packed),
            seq_length=packed[0].tokens_T.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=self.groups,
            **extra,
        )

    def _head(self, output_KX: Tensor) -> PackedOutput:
        """The last stage's output, with the output layer's weight and, once there is an optimizer, its float32 gradient."""
        weight_VH = self.model.output_weight
        return PackedOutput(
            output_KX,
            self.vocab,
            weight_VH,
            self.groups.tp,
            reduce_grad=not self.model.config.sequence_parallel,
            weight_grad_VH=getattr(weight_VH, "main_grad", None),
        )

    def _joined(self, readouts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the readouts over context-parallel ranks, each of which has its own tokens and 0 elsewhere.

        Every rank then computes the same loss, and its gradient reaches its own tokens only: summed over context-parallel
        ranks as over data shards, each token counts once.
        """
        if self.groups.cp.size() == 1:
            return readouts
        joined = reduce_from_tensor_model_parallel_region(torch.stack(list(readouts.values())), self.groups.cp)
        return dict(zip(readouts, joined, strict=True))
