"""Log-probability and entropy from logits, whole or split over tensor-parallel ranks, where no rank sees them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 24
"""Logits worked on at a time: beside the logits and their gradient, a few buffers of this many float32 (64 MiB)."""


class _LogProbs(torch.autograd.Function):
    """Two all-reduces: the row maximum, then (sum of exp, target logit, sum of exp x logit) in one tensor.

    The logits are the largest tensors of a step, so nothing of their size is kept beside them: the backward takes the
    exponentials again, some rows at a time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None, vocab: int
    ) -> tuple[Tensor, Tensor]:
        tokens, width = logits_TV.shape
        first = dist.get_rank(group) * width if group else 0
        real = min(width, max(0, vocab - first))  # the columns beyond only pad the vocabulary
        many = group is not None and dist.get_world_size(group) > 1
        top_T = logits_TV.new_full((tokens,), -torch.inf, dtype=torch.float32)
        if real:
            top_T = logits_TV[:, :real].amax(-1).float()
        if many:
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        here_T = (target_T >= first) & (target_T < first + real)
        local_T = (target_T - first).masked_fill(~here_T, 0)
        sums_3T = top_T.new_zeros(3, tokens)
        for part in _chunks(tokens, real):
            x_TV = logits_TV[part, :real] - top_T[part, None]
            sums_3T[1, part] = x_TV.gather(-1, local_T[part, None])[:, 0].masked_fill(~here_T[part], 0.0)
            exp_TV = x_TV.exp()
            sums_3T[0, part] = exp_TV.sum(-1)
            sums_3T[2, part] = x_TV.mul_(exp_TV).sum(-1)
        if many:
            dist.all_reduce(sums_3T, group=group)
        total_T, picked_T, weighted_T = sums_3T
        log_total_T = total_T.log()
        entropy_T = log_total_T - weighted_T / total_T
        ctx.save_for_backward(logits_TV, top_T + log_total_T, local_T, here_T, entropy_T)
        ctx.real = real
        ctx.set_materialize_grads(False)
        return picked_T - log_total_T, entropy_T

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_TV, log_sum_T, local_T, here_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.real :] = 0.0
        for part in _chunks(len(logits_TV), ctx.real):
            log_p_TV = logits_TV[part, : ctx.real] - log_sum_T[part, None]
            p_TV = log_p_TV.exp()
            found_TV = torch.zeros_like(p_TV) if grad_logp_T is None else p_TV * -grad_logp_T[part, None]
            if grad_logp_T is not None:  # d logp / d logits = onehot - p
                found_TV.scatter_add_(-1, local_T[part, None], (grad_logp_T[part] * here_T[part])[:, None])
            if grad_entropy_T is not None:  # d H / d logits = -p (log p + H)
                found_TV -= log_p_TV.add_(entropy_T[part, None]).mul_(p_TV).mul_(grad_entropy_T[part, None])
            grad_TV[part, : ctx.real] = found_TV
        return grad_TV, None, None, None


def _chunks(tokens: int, width: int) -> list[slice]:
    """Rows in parts of at most CHUNK logits; none where there is no column."""
    step = max(1, CHUNK // max(1, width))
    return [slice(at, at + step) for at in range(0, tokens, step)] if width else []


def logprobs_and_entropy(
    logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup | None, vocab: int
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of each row of logits, in nats, float32; gradients flow to the logits.

    Args:
        logits_TV: [T, V / tensor], this rank's slice of the (padded) vocabulary.
        target_T: int64 token ids in the whole vocabulary.
        group: tensor-parallel group; None: the vocabulary is whole here.
        vocab: true vocabulary size; columns beyond it have probability 0.

    Returns:
        (logp_T, entropy_T), equal on every rank of the group.
    """
    assert logits_TV.dim() == 2 and target_T.shape == logits_TV.shape[:1]
    return _LogProbs.apply(logits_TV, target_T, group, vocab)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Logits:
    """A `HeadOutput`: logits, or the numbers of a scalar head, of one microbatch."""

    output_TX: Tensor
    """[T, V / tensor] logits, or [T, 1] of a scalar head, which every tensor rank has."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None: the vocabulary is whole here."""
    vocab: int
    """True vocabulary size."""

    def logprobs_and_entropy(self, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Each [T] float32."""
        logits_TV = self.output_TX / temperature if temperature != 1.0 else self.output_TX
        return logprobs_and_entropy(logits_TV, target_T, self.group, self.vocab)

    def scalar(self) -> Tensor:
        """[T]."""
        return self.output_TX[:, 0]
