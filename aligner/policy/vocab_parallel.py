"""Log-probability and entropy from logits that are split over tensor-parallel ranks; no rank sees them whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _LogProbs(torch.autograd.Function):
    """Two all-reduces: the row maximum, then (sum of exp, target logit, sum of exp x logit) in one tensor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup, vocab: int
    ) -> tuple[Tensor, Tensor]:
        first = dist.get_rank(group) * logits_TV.shape[-1]
        x_TV = logits_TV.float()
        if first + x_TV.shape[-1] > vocab:  # rows that only pad the vocabulary
            x_TV = x_TV.clone() if x_TV is logits_TV else x_TV
            x_TV[:, max(0, vocab - first) :] = -torch.inf
        top_T = x_TV.amax(-1)
        many = dist.get_world_size(group) > 1
        if many:
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        x_TV = x_TV - top_T[:, None]
        here_T = (target_T >= first) & (target_T < first + x_TV.shape[-1])
        local_T = (target_T - first).masked_fill(~here_T, 0)
        picked_T = x_TV.gather(-1, local_T[:, None])[:, 0].masked_fill(~here_T, 0.0)
        exp_TV = x_TV.exp()
        weighted_T = torch.where(exp_TV > 0, exp_TV * x_TV, 0.0).sum(-1)
        sums = torch.stack([exp_TV.sum(-1), picked_T, weighted_T])
        if many:
            dist.all_reduce(sums, group=group)
        total_T, picked_T, weighted_T = sums
        log_total_T = total_T.log()
        entropy_T = log_total_T - weighted_T / total_T
        p_TV = exp_TV.div_(total_T[:, None])
        ctx.save_for_backward(p_TV, local_T, here_T, entropy_T)
        ctx.dtype = logits_TV.dtype
        ctx.set_materialize_grads(False)
        return picked_T - log_total_T, entropy_T

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        p_TV, local_T, here_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.zeros_like(p_TV)
        if grad_logp_T is not None:  # d logp / d logits = onehot - p
            grad_TV = p_TV * -grad_logp_T[:, None]
            grad_TV.scatter_add_(-1, local_T[:, None], (grad_logp_T * here_T)[:, None].to(grad_TV.dtype))
        if grad_entropy_T is not None:  # d H / d logits = -p (log p + H)
            log_p_TV = torch.where(p_TV > 0, p_TV, 1.0).log()
            grad_TV -= p_TV * (log_p_TV + entropy_T[:, None]) * grad_entropy_T[:, None]
        return grad_TV.to(ctx.dtype), None, None, None


def logprobs_and_entropy(
    logits_TV: Tensor, target_T: Tensor, group: dist.ProcessGroup, vocab: int
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of each row of logits, in nats, float32; gradients flow to the logits.

    Args:
        logits_TV: [T, V / tensor], this rank's slice of the (padded) vocabulary.
        target_T: int64 token ids in the whole vocabulary.
        group: tensor-parallel group.
        vocab: true vocabulary size; columns beyond it have probability 0.

    Returns:
        (logp_T, entropy_T), equal on every rank of the group.
    """
    assert logits_TV.dim() == 2 and target_T.shape == logits_TV.shape[:1]
    return _LogProbs.apply(logits_TV, target_T, group, vocab)  # type: ignore[no-any-return]
