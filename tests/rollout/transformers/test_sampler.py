"""Draws against vLLM's: the same processed logits, and the same noise, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aligner.rollout.config import Sampling
from aligner.rollout.transformers import sampler
from aligner.rollout.transformers.sampler import RowSampling, draw, top_k_top_p
from aligner.rollout.vllm.draws import gumbel_draw, place_seeds

VOCAB = 301


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    import vllm._custom_ops  # noqa: F401


def logits(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3))


def test_seeds_and_noise_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_NOISE", 7 * VOCAB)  # seven rows at a time
    seed_B = torch.tensor([0, 7, 8, 1 << 47, (1 << 62) + 5]).repeat(200)
    place_B = torch.arange(1000)
    ours_B, theirs_B = sampler.place_seeds(seed_B, place_B), place_seeds(seed_B.numpy(), place_B.numpy())
    assert ours_B.numpy().tolist() == theirs_B.tolist()
    logits_BV = logits(1000)
    assert torch.equal(sampler.gumbel_draw(logits_BV, ours_B), gumbel_draw(logits_BV, theirs_B))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (40, 1.0), (0, 0.9), (0, 1e-9), (25, 0.7)])
def test_top_k_and_top_p_are_vllms(top_k: int, top_p: float) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits_BV = logits(50)
    logits_BV[0, 5:60] = logits_BV[0, 3]  # ties
    k_B, p_B = torch.full((50,), top_k or VOCAB), torch.full((50,), top_p)
    theirs_BV = apply_top_k_top_p(logits_BV.clone(), k_B if top_k else None, p_B if top_p < 1 else None)
    ours_BV = top_k_top_p(logits_BV, k_B, p_B)
    assert torch.equal(ours_BV.isinf(), theirs_BV.isinf())
    assert torch.equal(ours_BV, theirs_BV)
    mixed_BV = top_k_top_p(logits_BV, torch.where(torch.arange(50) % 2 == 0, k_B, VOCAB), p_B.where(k_B > 0, p_B))
    assert torch.equal(mixed_BV[::2], theirs_BV[::2])


def test_log_probabilities_are_of_the_distribution_drawn_from() -> None:
    """By hand: softmax over the tokens that are left, after the temperature; a greedy row has neither."""
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)
    samplings = [Sampling(temperature=0.5, top_k=2), Sampling(temperature=0.0, top_k=1), Sampling(top_p=0.6)]
    rows = RowSampling.of(samplings, [5, 5, 5], 4, torch.device("cpu"))
    token_B, logp_B = draw(logits_BV, rows, torch.tensor([9, 9, 9]))
    p_2 = float(torch.tensor([4.0, 2.0]).softmax(0)[int(token_B[0])])  # two tokens are left, at half the temperature
    assert logp_B.tolist() == pytest.approx([np.log(p_2), float(torch.log_softmax(logits_BV[0], 0)[0]), 0.0], abs=1e-6)
    assert token_B[1:].tolist() == [0, 0]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits_BV, seeds = logits(6), [1, 2, 3, 4, 5, 6]
    rows = RowSampling.of([Sampling(temperature=0.8)] * 6, seeds, VOCAB, torch.device("cpu"))
    together_B, _ = draw(logits_BV, rows, torch.arange(6))
    for row in range(6):
        alone_B, _ = draw(logits_BV[row : row + 1], rows.select(torch.tensor([row])), torch.tensor([row]))
        assert alone_B == together_B[row]
