"""What ranks do in the tests of the fused output layer: their shards of the vocabulary beside whole logits in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligner.spmd.world import World
from aligner.trainer import output_layer

HIDDEN = 24


@dataclass(frozen=True)
class Case:
    """A vocabulary, tokens, and how the logits are taken."""

    tokens: int
    block: int
    """Logits of one block, at most."""
    vocab: int = 61
    padded: int = 64
    temperature: float = 1.0
    softcap: float | None = None
    entropy: bool = True


@contextmanager
def blocks_of(logits: int) -> Iterator[None]:
    usual = output_layer.BLOCK_LOGITS["cpu"]
    output_layer.BLOCK_LOGITS["cpu"] = logits
    try:
        yield
    finally:
        output_layer.BLOCK_LOGITS["cpu"] = usual


def draw(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden": torch.randn(case.tokens, HIDDEN, generator=generator).to(dtype),
        "weight": torch.randn(case.padded, HIDDEN, generator=generator).to(dtype),
        "target": torch.randint(0, case.vocab, (case.tokens,), generator=generator),
        "grad_logp": torch.randn(case.tokens, generator=generator),
        "grad_entropy": torch.randn(case.tokens, generator=generator) * case.entropy,
    }


def reference(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole logits in float64, by torch's own log_softmax and autograd."""
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = hidden @ weight[: case.vocab].T
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    log_p = (logits / case.temperature).log_softmax(-1)
    logp, entropy = log_p.gather(1, given["target"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (logp * given["grad_logp"] + entropy * given["grad_entropy"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"logp": logp.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}


def errors(world: World, case: Case, dtype: str, in_place: bool) -> dict[str, float]:
    """The largest differences, relative to the largest value.

    Args:
        in_place: the weight's gradient is added to a float32 tensor, which has something in it already.
    """
    given = draw(case, getattr(torch, dtype))
    wanted = reference(case, given)
    hidden = given["hidden"].clone().requires_grad_()
    weight = given["weight"].chunk(world.size)[world.rank].clone().requires_grad_()
    into = torch.full(weight.shape, 2.0) if in_place else None
    options: dict[str, Any] = {"temperature": case.temperature, "softcap": case.softcap, "with_entropy": case.entropy}
    with blocks_of(case.block):
        logp, entropy = output_layer.output_logprobs(
            hidden, weight, given["target"], vocab=case.vocab, group=dist.group.WORLD, weight_grad_VH=into, **options
        )
        loss = (logp * given["grad_logp"]).sum()
        if entropy is not None:
            loss = loss + (entropy * given["grad_entropy"]).sum()
        loss.backward()
    assert (entropy is None) == (not case.entropy) and hidden.grad is not None
    if into is not None:
        assert weight.grad is None
    grad = into - 2.0 if into is not None else weight.grad
    assert grad is not None
    padding = grad[max(0, case.vocab - world.rank * len(weight)) :]
    assert bool((padding == 0).all()), "rows that pad the vocabulary got a gradient"
    made = {"logp": logp.detach(), "hidden": hidden.grad, "weight": grad}
    if entropy is not None:
        made["entropy"] = entropy.detach()
    wanted["weight"] = wanted["weight"].chunk(world.size)[world.rank]
    return {name: relative(value, wanted[name]) for name, value in made.items()}


def relative(value: Tensor, wanted: Tensor) -> float:
    assert value.shape == wanted.shape
    if not value.numel():
        return 0.0
    return ((value.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)).item()
