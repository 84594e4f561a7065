"""The output layer fused with log-probabilities and entropy: logits are never whole, neither in the forward nor in the backward.

The vocabulary is taken in blocks of columns, as tensor-parallel ranks take it in shards: each block's logits give their
maximum, sum of exponentials and so on, which are joined over blocks and then over ranks. The backward makes the logits again,
all but those of the last `KEPT_BLOCKS`, whose exponentials are kept. Columns rather than rows: so each row of the weight is read once, and its
gradient written once, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from aligner.trainer.output_blocks import BLOCK_LOGITS, KEPT_BLOCKS
from aligner.trainer.products import add_product, product


@dataclass(frozen=True)
class _Logits:
    """The logits of N tokens over this rank's shard of the vocabulary, made block by block."""

    hidden_NH: Tensor
    weight_VH: Tensor
    first: int
    """Token id of the shard's first row."""
    vocab: int
    temperature: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is computed from logits."""
        return torch.promote_types(self.hidden_NH.dtype, torch.float32)

    def blocks(self) -> list[slice]:
        """Ranges of the shard's rows, without those that only pad the vocabulary; equal but for the last."""
        real = min(len(self.weight_VH), max(0, self.vocab - self.first))
        most = max(1, BLOCK_LOGITS[self.hidden_NH.device.type] // max(1, len(self.hidden_NH)))
        width = -(-real // -(-real // most)) if real else 1
        return [slice(at, min(at + width, real)) for at in range(0, real, width)]

    def make(self, block: slice) -> Tensor:
        """[N, V of the block] after soft-capping and temperature; the product is rounded as the weights are."""
        logits_NV = product(self.hidden_NH, self.weight_VH[block].T).to(self.dtype)
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV if self.temperature == 1.0 else logits_NV.div_(self.temperature)

    def grad_of_product(self, grad_NV: Tensor, block: slice) -> Tensor:
        """The gradient of what `make` returns -> that of the product, in its data type; overwrites its argument."""
        if self.softcap is not None:  # d c tanh(x / c) / dx = 1 - tanh(x / c)^2
            tanh_NV = self.make(block).mul_(self.temperature / self.softcap)
            grad_NV.mul_(tanh_NV.square_().neg_().add_(1.0))
        if self.temperature != 1.0:
            grad_NV.div_(self.temperature)
        return grad_NV.to(self.weight_VH.dtype)

    def columns(self, target_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        """([N, 1] column of each target in the block, or 0; [N] whether it is one)."""
        column_N = target_N - (self.first + block.start)
        inside_N = (column_N >= 0) & (column_N < block.stop - block.start)
        return column_N.masked_fill(~inside_N, 0)[:, None], inside_N


@dataclass
class _Sums:
    """What is known of each token's logits x over some columns."""

    top_N: Tensor
    """Their maximum; -inf where there is no column."""
    total_N: Tensor
    """Sum of exp(x - top)."""
    target_N: Tensor
    """The target's logit; 0 where it is none of the columns."""
    weighted_N: Tensor
    """Sum of exp(x - top) (x - top)."""

    def rise_to(self, top_N: Tensor) -> None:
        """Relative to a higher maximum."""
        lower_N = self.top_N - top_N
        scale_N = lower_N.exp()
        self.weighted_N = scale_N * (self.weighted_N + lower_N * self.total_N)
        self.total_N, self.top_N = scale_N * self.total_N, top_N

    def join(self, other: _Sums) -> _Sums:
        """Over the columns of both, which then change."""
        top_N = torch.maximum(self.top_N, other.top_N)
        for one in (self, other):
            one.rise_to(top_N)
        return _Sums(
            top_N,
            self.total_N + other.total_N,
            self.target_N + other.target_N,
            self.weighted_N + other.weighted_N,
        )


def _sums_of_block(logits: _Logits, block: slice, target_N: Tensor, with_entropy: bool) -> tuple[_Sums, Tensor]:
    """(the sums, exp(x - top) of the block)."""
    x_NV = logits.make(block)
    column_N1, inside_N = logits.columns(target_N, block)
    picked_N = x_NV.gather(-1, column_N1)[:, 0].masked_fill(~inside_N, 0.0)
    top_N = x_NV.amax(-1)
    x_NV.sub_(top_N[:, None])
    exp_NV = x_NV.exp() if with_entropy else x_NV.exp_()
    weighted_N = x_NV.mul_(exp_NV).sum(-1) if with_entropy else torch.zeros_like(top_N)
    return _Sums(top_N, exp_NV.sum(-1), picked_N, weighted_N), exp_NV


def _sums_over_ranks(sums: _Sums | None, like_N: Tensor, group: dist.ProcessGroup | None) -> _Sums:
    """Over all columns: two all-reduces, of the maxima and of everything else. None: this rank has no columns."""
    if group is None:
        assert sums is not None, "a vocabulary without tokens"
        return sums
    top_N = like_N.new_full(like_N.shape, -torch.inf) if sums is None else sums.top_N.clone()
    dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
    sums_3N = like_N.new_zeros(3, len(like_N))
    if sums is not None:
        sums.rise_to(top_N)
        sums_3N = torch.stack([sums.total_N, sums.target_N, sums.weighted_N])
    dist.all_reduce(sums_3N, group=group)
    return _Sums(top_N, *sums_3N)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        logits: _Logits,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
        reduce_grad: bool,
        weight_grad_VH: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        keep = any(ctx.needs_input_grad[:2]) and logits.softcap is None
        sums = None
        blocks = logits.blocks()
        kept: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(blocks):
            of_block, exp_NV = _sums_of_block(logits, block, target_N, with_entropy)
            if keep and number >= len(blocks) - KEPT_BLOCKS:
                kept.append((exp_NV, of_block.top_N))
            del exp_NV
            sums = of_block if sums is None else sums.join(of_block)
        over_all = _sums_over_ranks(sums, torch.zeros_like(target_N, dtype=logits.dtype), group)
        log_total_N = over_all.total_N.log()
        entropy_N = log_total_N - over_all.weighted_N / over_all.total_N
        # hidden states among the saved tensors, which go after the backward; the context stays until all of it is through
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, over_all.top_N + log_total_N, entropy_N)
        ctx.logits_settings = (logits.first, logits.vocab, logits.temperature, logits.softcap)
        ctx.kept, ctx.weight_grad_VH = kept, weight_grad_VH
        ctx.group = group if reduce_grad else None
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return (over_all.target_N - over_all.top_N) - log_total_N, entropy_N

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, *of_tokens = ctx.saved_tensors
        logits = _Logits(hidden_NH, weight_VH, *ctx.logits_settings)
        kept, ctx.kept = ctx.kept if grad_entropy_N is None else [], []
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=logits.dtype)
        grad_weight_VH = ctx.weight_grad_VH
        if grad_weight_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH)
        for block in reversed(logits.blocks()):
            of_block = kept.pop() if kept else None
            grad_NV = _grad_of_block(logits, block, of_block, of_tokens, grad_logp_N, grad_entropy_N)
            del of_block
            product_NV = logits.grad_of_product(grad_NV, block)
            del grad_NV
            add_product(grad_hidden_NH, product_NV, weight_VH[block])
            add_product(grad_weight_VH[block], product_NV.T, hidden_NH)
            del product_NV  # before the next block's logits are made
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_NH, group=ctx.group)
        given = ctx.weight_grad_VH is not None
        return grad_hidden_NH.to(hidden_NH.dtype), None if given else grad_weight_VH, *[None] * 6


def _grad_of_block(
    logits: _Logits,
    block: slice,
    kept: tuple[Tensor, Tensor] | None,
    of_tokens: Sequence[Tensor],
    grad_logp_N: Tensor | None,
    grad_entropy_N: Tensor | None,
) -> Tensor:
    """[N, V of the block]: the gradient of the logits.

    Args:
        kept: (exp(x - top) of this block, top) as the forward has left them, which will do without the entropy's gradient;
            overwritten.
        of_tokens: target_N, the logarithm of the sum of exp, entropy_N.
    """
    target_N, log_sum_N, entropy_N = of_tokens
    log_p_NV = None
    if kept is not None:
        p_NV, top_N = kept
        p_NV.mul_((top_N - log_sum_N).exp_()[:, None])
    else:
        log_p_NV = logits.make(block).sub_(log_sum_N[:, None])
        p_NV = log_p_NV.exp()
    if grad_entropy_N is not None:  # d H / d x = -p (log p + H)
        assert log_p_NV is not None
        log_p_NV.add_(entropy_N[:, None]).mul_(grad_entropy_N[:, None])
        if grad_logp_N is not None:
            log_p_NV.add_(grad_logp_N[:, None])
        grad_NV = p_NV.mul_(log_p_NV.neg_())
    else:
        grad_NV = p_NV.mul_(-grad_logp_N[:, None]) if grad_logp_N is not None else p_NV.zero_()
    if grad_logp_N is not None:  # d log p / d x = onehot - p
        column_N1, inside_N = logits.columns(target_N, block)
        grad_NV.scatter_add_(-1, column_N1, (grad_logp_N * inside_N)[:, None])
    return grad_NV


def output_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    vocab: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = True,
    reduce_grad: bool = True,
    weight_grad_VH: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and the entropy of the distribution that each token's hidden state gives, in nats, float32.

    Logits are hidden @ weight^T, then softcap x tanh(logits / softcap) where one is given (Gemma 2), divided by `temperature`.
    Gradients flow to the hidden states and the weight.

    Args:
        hidden_NH: [N, H], equal on the ranks of the group; N may be 0.
        weight_VH: [V / tensor, H], this rank's shard of the (padded) output weight.
        target_N: int64 token ids in the whole vocabulary.
        vocab: true vocabulary size; rows of the weight beyond it have probability 0 and get no gradient.
        group: tensor-parallel group, whose ranks hold the shards in order; None: the weight is whole here.
        reduce_grad: sum the hidden states' gradient over the group; false where the caller does (a gather of
            sequence-parallel shards, whose backward is a reduce-scatter).
        weight_grad_VH: float32 like the weight: its gradient is added to this, and autograd gets none for the weight.

    Returns:
        (logp_N, entropy_N), equal on every rank of the group; None for the entropy without `with_entropy`.
    """
    assert hidden_NH.dim() == 2 and target_N.shape == hidden_NH.shape[:1]
    group = group if group is not None and dist.get_world_size(group) > 1 else None
    first = dist.get_rank(group) * len(weight_VH) if group else 0
    logits = _Logits(hidden_NH.detach(), weight_VH.detach(), first, vocab, temperature, softcap)
    logp_N, entropy_N = _LogProbs.apply(
        hidden_NH, weight_VH, target_N, logits, group, with_entropy, reduce_grad, weight_grad_VH
    )
    return logp_N, entropy_N if with_entropy else None


@dataclass(frozen=True)
class PackedOutput:
    """A `HeadOutput` of a model whose hidden states for the K kept tokens are whole on this rank, or of its scalar head."""

    output_KX: Tensor
    """[K, H] final hidden states; [K, 1] of a scalar head, which every tensor rank has."""
    vocab: int
    """True vocabulary size."""
    weight_VH: Tensor | None = None
    """[V / tensor, H] of the output layer; None: a scalar head."""
    group: dist.ProcessGroup | None = None
    """Tensor-parallel group; None: the vocabulary is whole here."""
    reduce_grad: bool = True
    """See `output_logprobs`."""
    weight_grad_VH: Tensor | None = None
    """See `output_logprobs`."""
    softcap: float | None = None
    """See `output_logprobs`."""

    def logprobs_and_entropy(
        self, source_N: Tensor, target_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Each [N] float32."""
        assert self.weight_VH is not None, "the model has a scalar head"
        return output_logprobs(
            self.output_KX.index_select(0, source_N),
            self.weight_VH,
            target_N,
            vocab=self.vocab,
            group=self.group,
            temperature=temperature,
            softcap=self.softcap,
            with_entropy=with_entropy,
            reduce_grad=self.reduce_grad,
            weight_grad_VH=self.weight_grad_VH,
        )

    def scalar(self) -> Tensor:
        """[K]."""
        return self.output_KX[:, 0]
