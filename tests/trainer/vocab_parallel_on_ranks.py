"""What ranks do in the tests of split logits: values and gradients beside torch's log_softmax of the whole row in float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.spmd.world import World
from aligner.trainer.vocab_parallel import logprobs_and_entropy

TOKENS, PADDED_VOCAB, VOCAB = 11, 64, 61


def logits_and_targets() -> tuple[Tensor, Tensor]:
    """[T, padded V] logits in float64 and [T] targets, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = (torch.randn(TOKENS, PADDED_VOCAB, generator=generator) * 4).double()
    return logits_TV, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def share(world: World, logits_TV: Tensor) -> Tensor:
    """This rank's columns, in float32."""
    return logits_TV.float().chunk(world.size, -1)[world.rank].clone().requires_grad_()


def check_against_float64(world: World) -> None:
    """Log-probabilities, entropy and the gradient of a weighted sum of both."""
    whole_TV, target_T = logits_and_targets()
    generator = torch.Generator().manual_seed(1)
    logp_weight_T, entropy_weight_T = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    reference_TV = whole_TV.clone().requires_grad_()
    logp_TV = reference_TV[:, :VOCAB].log_softmax(-1)
    expected_logp_T = logp_TV.gather(1, target_T[:, None])[:, 0]
    expected_entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    (expected_logp_T * logp_weight_T + expected_entropy_T * entropy_weight_T).sum().backward()
    assert reference_TV.grad is not None
    mine_TV = share(world, whole_TV)
    logp_T, entropy_T = logprobs_and_entropy(mine_TV, target_T, dist.group.WORLD, VOCAB)
    (logp_T * logp_weight_T.float() + entropy_T * entropy_weight_T.float()).sum().backward()
    assert mine_TV.grad is not None
    pairs = (
        (logp_T, expected_logp_T),
        (entropy_T, expected_entropy_T),
        (mine_TV.grad, reference_TV.grad.chunk(world.size, -1)[world.rank]),
    )
    errors = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
    assert max(errors) < 3e-6, errors
    padding = mine_TV.grad[:, max(0, VOCAB - world.rank * mine_TV.shape[1]) :]
    assert not padding.any(), "padding got a gradient"


def check_logprobs_alone(world: World) -> None:
    """Where nobody asks for the entropy's gradient, what arrives is finite and that of the log-probabilities."""
    whole_TV, target_T = logits_and_targets()
    mine_TV = share(world, whole_TV)
    logprobs_and_entropy(mine_TV, target_T, dist.group.WORLD, VOCAB)[0].sum().backward()
    reference_TV = whole_TV.clone().requires_grad_()
    reference_TV[:, :VOCAB].log_softmax(-1).gather(1, target_T[:, None]).sum().backward()
    assert mine_TV.grad is not None and reference_TV.grad is not None
    assert torch.isfinite(mine_TV.grad).all()
    error = float((mine_TV.grad - reference_TV.grad.chunk(world.size, -1)[world.rank]).abs().max())
    assert error < 3e-6, error
