"""Log-probability and entropy from logits, vocabulary-parallel over tensor-parallel ranks or complete on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 24
"""Number of logits processed at a time: besides the logits and their gradient, a few float32 buffers of this size (64 MiB)."""


class _LogProbs(torch.autograd.Function):
    """Two all-reduces: the row maximum, then (sum of exp, target logit, sum of exp x logit) in one tensor.

    The logits are the largest tensors of a step, so no other tensor of their size is kept: the backward recomputes the
    exponentials, a chunk of rows at a time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None, vocab: int
    ) -> tuple[Tensor, Tensor]:
        tokens, width = logits_TV.shape
        first_token = dist.get_rank(group) * width if group else 0
        columns = min(width, max(0, vocab - first_token))  # those beyond are padding of the vocabulary
        is_sharded = group is not None and dist.get_world_size(group) > 1
        max_T = logits_TV.new_full((tokens,), -torch.inf, dtype=torch.float32)
        if columns:
            max_T = logits_TV[:, :columns].amax(-1).float()
        if is_sharded:
            dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
        is_local_T = (target_T >= first_token) & (target_T < first_token + columns)
        local_T = (target_T - first_token).masked_fill(~is_local_T, 0)
        sums_3T = max_T.new_zeros(3, tokens)
        for rows in _chunks(tokens, columns):
            x_TV = logits_TV[rows, :columns] - max_T[rows, None]
            sums_3T[1, rows] = x_TV.gather(-1, local_T[rows, None])[:, 0].masked_fill(~is_local_T[rows], 0.0)
            exp_TV = x_TV.exp()
            sums_3T[0, rows] = exp_TV.sum(-1)
            sums_3T[2, rows] = x_TV.mul_(exp_TV).sum(-1)
        if is_sharded:
            dist.all_reduce(sums_3T, group=group)
        total_T, target_logit_T, weighted_T = sums_3T
        log_total_T = total_T.log()
        entropy_T = log_total_T - weighted_T / total_T
        ctx.save_for_backward(logits_TV, max_T + log_total_T, local_T, is_local_T, entropy_T)
        ctx.columns = columns
        ctx.set_materialize_grads(False)
        return target_logit_T - log_total_T, entropy_T

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_TV, log_sum_T, local_T, is_local_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.columns :] = 0.0
        for rows in _chunks(len(logits_TV), ctx.columns):
            log_p_TV = logits_TV[rows, : ctx.columns] - log_sum_T[rows, None]
            p_TV = log_p_TV.exp()
            chunk_grad_TV = torch.zeros_like(p_TV) if grad_logp_T is None else p_TV * -grad_logp_T[rows, None]
            if grad_logp_T is not None:  # d logp / d logits = onehot - p
                chunk_grad_TV.scatter_add_(-1, local_T[rows, None], (grad_logp_T[rows] * is_local_T[rows])[:, None])
            if grad_entropy_T is not None:  # d H / d logits = -p (log p + H)
                chunk_grad_TV -= log_p_TV.add_(entropy_T[rows, None]).mul_(p_TV).mul_(grad_entropy_T[rows, None])
            grad_TV[rows, : ctx.columns] = chunk_grad_TV
        return grad_TV, None, None, None


def _chunks(tokens: int, width: int) -> list[slice]:
    """Slices of rows of at most CHUNK logits each; none if there are no columns."""
    step = max(1, CHUNK // max(1, width))
    return [slice(start, start + step) for start in range(0, tokens, step)] if width else []


def logprobs_and_entropy(
    logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None, vocab: int
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of each row of logits, in nats, float32; gradients flow to the logits.

    Args:
        logits_TV: [T, V / tensor], this rank's slice of the padded vocabulary.
        target_T: int64 token ids.
        group: tensor-parallel group; None: this rank has the complete vocabulary.
        vocab: unpadded vocabulary size; columns beyond it have probability 0.

    Returns:
        (logp_T, entropy_T) [T] float32, equal on every rank of the group.
    """
    assert logits_TV.dim() == 2 and target_T.shape == logits_TV.shape[:1]
    return _LogProbs.apply(logits_TV, target_T, group, vocab)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Logits:
    """A `HeadOutput`: logits, or a scalar head's output, of one microbatch."""

    output_TX: Tensor
    """[T, V / tensor] logits, or [T, 1] of a scalar head, the same on every tensor-parallel rank."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None: this rank has the complete vocabulary."""
    vocab: int
    """Unpadded vocabulary size."""

    def logprobs_and_entropy(self, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Each [T] float32."""
        logits_TV = self.output_TX / temperature if temperature != 1.0 else self.output_TX
        return logprobs_and_entropy(logits_TV, target_T, self.group, self.vocab)

    def scalar(self) -> Tensor:
        """[T]."""
        return self.output_TX[:, 0]
