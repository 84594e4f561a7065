"""Run microbatches through the role's pipeline with Megatron's schedules: log-probabilities out, or gradients in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from aligner.policy.model import ShardedModel
from aligner.policy.packing import Packed
from aligner.policy.vocab_parallel import logprobs_and_entropy

Loss = Callable[[int, Tensor, Tensor], Tensor]
"""(microbatch number, policy_logp_BT, entropy_BT) -> scalar to add to the global loss."""


class Pipeline:
    """One role's model and groups, ready to run packed microbatches."""

    def __init__(self, model: ShardedModel, groups: ProcessGroupCollection, vocab: int) -> None:
        self.model, self.groups, self.vocab = model, groups, vocab

    def logprobs(self, packed: Sequence[Packed], temperature: float) -> list[Tensor]:
        """Forward only. [B, width] log-probabilities of each microbatch on the last stage; [] on the others."""
        found: dict[int, Tensor] = {}

        def collect(number: int, logp_BT: Tensor, _: Tensor) -> Tensor:
            found[number] = logp_BT
            return logp_BT.sum()

        with torch.no_grad():
            self._run(self.model.chunks, packed, temperature, collect, forward_only=True)
        return [found[number] for number in sorted(found)]

    def backward(self, wrapped: list[Any], packed: Sequence[Packed], temperature: float, loss: Loss) -> None:
        """Forward and backward of every microbatch, then the reduction of gradients over the role's ranks."""
        self._run(wrapped, packed, temperature, loss, forward_only=False)

    def _run(
        self, chunks: Sequence[Any], packed: Sequence[Packed], temperature: float, loss: Loss, forward_only: bool
    ) -> None:
        def forward_step(iterator: Any, module: Any) -> Any:
            number, batch = next(iterator)
            self.model.rotary.positions_T = batch.positions_T
            output = module(batch.tokens_T[None], batch.positions_T[None], batch.lengths)

            def loss_of(logits_1TV: Tensor) -> Any:
                logits_TV = logits_1TV[0]
                if temperature != 1.0:
                    logits_TV = logits_TV / temperature
                logp_T, entropy_T = logprobs_and_entropy(logits_TV, batch.targets_T, self.groups.tp, self.vocab)
                value = loss(number, batch.to_rows(logp_T), batch.to_rows(entropy_T))
                # three values: Megatron then neither averages over microbatches nor scales by data shards
                return value, torch.zeros((), dtype=torch.int, device=value.device), {}

            return output, loss_of

        stages, many = self.groups.pp.size(), len(chunks) > 1
        extra = {"p2p_communicator": P2PCommunicator(self.groups.pp, self.model.config)} if stages > 1 else {}
        iterators = [iter(enumerate(packed)) for _ in chunks]
        get_forward_backward_func(pp_size=stages, vp_size=len(chunks) if many else None)(
            forward_step_func=forward_step,
            data_iterator=iterators if many else iterators[0],
            model=list(chunks) if many else chunks[0],
            num_microbatches=len(packed),
            seq_length=packed[0].tokens_T.numel(),
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=self.groups,
            **extra,
        )
