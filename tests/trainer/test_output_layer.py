"""The fused output layer against whole logits in float64: values, gradients, block borders, shards of the vocabulary; its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aligner.trainer import output_layer
from aligner.trainer.output_blocks import KEPT_BLOCKS
from aligner.trainer.output_layer import PackedOutput, output_logprobs
from tests.conftest import Ranks
from tests.trainer.output_layer_on_ranks import Case, blocks_of

WHOLE = 1 << 20
CASES = {
    "one block": Case(11, WHOLE),
    "blocks of 1 column": Case(11, 11),
    "blocks of 7 columns and a last one of 5": Case(11, 7 * 11),
    "one column more than a block": Case(11, 60 * 11),
    "1 token": Case(1, 16),
    "no token": Case(0, 16),
    "temperature": Case(11, 200, temperature=0.6),
    "soft cap": Case(11, 200, softcap=3.0, temperature=1.3),
    "no entropy": Case(11, 200, entropy=False),
    "a shard of padding alone": Case(11, 200, vocab=30, padded=64),
    "a vocabulary of 1": Case(3, 200, vocab=1, padded=2),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["autograd", "in place"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 2])
def test_against_float64(ranks: Ranks, size: int, case: Case, in_place: bool) -> None:
    for of_rank in ranks(size).run("tests.trainer.output_layer_on_ranks:errors", case, "float32", in_place):
        assert max(of_rank.values()) < 3e-6, of_rank


@pytest.mark.parametrize("block", [WHOLE, 11 * 9])
@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_weights(ranks: Ranks, size: int, block: int) -> None:
    """Logits of up to 16 and their gradients are rounded to 8 bits, everything between is float32; blocks add no error to that."""
    for of_rank in ranks(size).run("tests.trainer.output_layer_on_ranks:errors", Case(11, block), "bfloat16", True):
        assert max(of_rank.values()) < 3e-2, of_rank


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients_by_finite_differences(softcap: float | None, with_entropy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).double().requires_grad_() for n in (5, 9))
    target = torch.tensor([0, 3, 7, 7, 5])

    def outputs(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, ...]:
        settings = {"vocab": 8, "temperature": 0.7, "softcap": softcap, "with_entropy": with_entropy}
        return tuple(x for x in output_logprobs(hidden_NH, weight_VH, target, **settings) if x is not None)  # type: ignore[arg-type]

    with blocks_of(3 * 5):
        # a second backward finds no exponentials kept, and makes the logits again: equal to rounding
        assert torch.autograd.gradcheck(outputs, (hidden, weight), nondet_tol=1e-12)


def test_only_the_entropy_in_the_loss() -> None:
    hidden, weight = torch.randn(6, 8).requires_grad_(), torch.randn(12, 8).requires_grad_()
    target = torch.arange(6)
    _, entropy = output_logprobs(hidden, weight, target, vocab=12)
    assert entropy is not None
    entropy.sum().backward()
    log_p = (hidden.detach().double().requires_grad_() @ weight.detach().double().T).log_softmax(-1)
    assert torch.allclose(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-6)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_logits_far_from_0_stay_finite() -> None:
    """A target of probability 0 in float32 has a finite log-probability, and blocks of very different maxima are joined."""
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[1000.0], [0.0], [-1000.0], [999.0]])
    with blocks_of(2):
        logp, entropy = output_logprobs(hidden, weight, torch.tensor([2, 0]), vocab=4)
    expected = (hidden.double() @ weight.double().T).log_softmax(-1)
    assert torch.allclose(logp.double(), expected[[0, 1], [2, 0]], atol=1e-3)
    assert entropy is not None and torch.isfinite(entropy).all()


def test_what_is_kept_for_the_backward_are_the_last_blocks() -> None:
    """Their exponentials: logits of all blocks are never there together."""
    tokens, vocab = 64, 1024
    sizes: list[int] = []
    usual = output_layer._Logits.make

    def counting(logits: output_layer._Logits, block: slice) -> Tensor:
        made = usual(logits, block)
        sizes.append(made.numel())
        return made

    hidden, weight = torch.randn(tokens, 8).requires_grad_(), torch.randn(vocab, 8).requires_grad_()
    with blocks_of(tokens * 128), pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer._Logits, "make", counting)
        logp, _ = output_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.long), vocab=vocab)
        assert sizes == [tokens * 128] * 8
        logp.sum().backward()
    assert sizes == [tokens * 128] * (16 - KEPT_BLOCKS), "the last blocks are not made again"


def test_only_tokens_that_predict_pass_through() -> None:
    hidden, weight = torch.randn(9, 4).requires_grad_(), torch.randn(8, 4)
    output = PackedOutput(hidden, 8, weight)
    source, target = torch.tensor([7, 2]), torch.tensor([3, 1])
    logp, _ = output.logprobs_and_entropy(source, target, 1.0, with_entropy=False)
    expected = (hidden @ weight.T).log_softmax(-1)[source, target]
    assert torch.allclose(logp, expected, atol=1e-6)
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum(-1).nonzero()[:, 0].tolist() == [2, 7]


def test_cases_have_the_borders_that_their_names_say() -> None:
    case = CASES["one column more than a block"]
    logits = output_layer._Logits(torch.zeros(11, 4), torch.zeros(64, 4), 0, 61, 1.0, None)
    with blocks_of(case.block):
        assert [block.stop - block.start for block in logits.blocks()] == [31, 30]
    with blocks_of(replace(case, block=1).block):
        assert len(logits.blocks()) == 61, "a block has a column, however many tokens there are"
