"""Log-probabilities and entropy of split logits against torch's log_softmax in float64, values and gradients."""

from __future__ import annotations

import pytest

PROGRAM = """
import torch, torch.distributed as dist
from aligner.trainer.vocab_parallel import logprobs_and_entropy
from aligner.spmd.world import World
world = World(60)
torch.manual_seed(0)
T, V, real = 11, 64, 61
whole = (torch.randn(T, V) * 4).double()
target = torch.randint(0, real, (T,))
g1, g2 = torch.randn(T).double(), torch.randn(T).double()
ref = whole.clone().requires_grad_()
lp = ref[:, :real].log_softmax(-1)
logp, entropy = lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp).sum(-1)
(logp * g1 + entropy * g2).sum().backward()
mine = whole.float().chunk(world.size, -1)[world.rank].clone().requires_grad_()
got, got_entropy = logprobs_and_entropy(mine, target, dist.group.WORLD, real)
(got * g1.float() + got_entropy * g2.float()).sum().backward()
expected = ref.grad.chunk(world.size, -1)[world.rank]
errors = [(got - logp).abs().max(), (got_entropy - entropy).abs().max(), (mine.grad - expected).abs().max()]
assert max(errors) < 3e-6, errors
assert bool((mine.grad.new_zeros(()) == mine.grad[:, max(0, real - world.rank * mine.shape[1]):]).all()), "padding got a gradient"
only = whole.float().chunk(world.size, -1)[world.rank].clone().requires_grad_()
logprobs_and_entropy(only, target, dist.group.WORLD, real)[0].sum().backward()
assert torch.isfinite(only.grad).all()
print("worst", float(max(errors)))
world.leave()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_against_float64(torchrun, ranks: int) -> None:  # type: ignore[no-untyped-def]
    done = torchrun(ranks, PROGRAM, seconds=90)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("worst") == ranks
