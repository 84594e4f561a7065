"""Draws by place: their distribution, their independence, and that nothing but seed and place decides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aligner.rollout.vllm.draws import gumbel_draw, place_seeds

P_V = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    import vllm._custom_ops  # noqa: F401


def draws(seed_B: np.ndarray, place_B: np.ndarray, p_V: Tensor = P_V) -> np.ndarray:
    logits_BV = p_V.log().expand(len(seed_B), -1).contiguous()
    return gumbel_draw(logits_BV, place_seeds(seed_B, place_B)).numpy()


def chi_square(count: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations from its mean."""
    freedom = count.size - 1
    return float(((count - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("seeds", ["neighbours", "far apart"])
def test_tokens_have_the_softmax_distribution_and_neighbours_are_independent(seeds: str) -> None:
    """500 seeds x 400 places; pairs at neighbouring places, and of neighbouring seeds, have the product's distribution."""
    seed = np.arange(500, dtype=np.uint64) * np.uint64(1 if seeds == "neighbours" else 1 << 40) + np.uint64(1 << 47)
    seed_B, place_B = (grid.flatten() for grid in np.meshgrid(seed, np.arange(400), indexing="ij"))
    drawn = draws(seed_B, place_B).reshape(500, 400)
    p = P_V.numpy().astype(np.float64)
    assert abs(chi_square(np.bincount(drawn.flatten(), minlength=8), p * drawn.size)) < 5
    pair = np.outer(p, p).flatten()
    for first, second in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):
        count = np.bincount((first * 8 + second).flatten(), minlength=64)
        assert abs(chi_square(count, pair * count.sum())) < 5


def test_a_draw_is_decided_by_seed_and_place() -> None:
    """Whatever the rest of the batch is; every bit of a seed counts, and seed and place do not stand for each other."""
    uniform = torch.full((4096,), 1 / 4096)
    seed_B = np.array([7, 7, 8, 1 << 47, 7 + (1 << 40)], dtype=np.uint64)
    place_B = np.array([3, 4, 3, 3, 3], dtype=np.int32)
    together = draws(seed_B, place_B, uniform)
    assert len(set(together.tolist())) == 5
    alone = [draws(seed_B[row : row + 1], place_B[row : row + 1], uniform)[0] for row in range(5)]
    assert together.tolist() == alone
    assert draws(seed_B[::-1].copy(), place_B[::-1].copy(), uniform).tolist() == alone[::-1]
    assert place_seeds(np.array([5]), np.array([6])) != place_seeds(np.array([6]), np.array([5]))
    assert place_seeds(seed_B, place_B).min() >= 0


def test_a_seeds_noise_differs_from_token_to_token() -> None:
    """The kernel's own part: equally likely tokens are drawn equally often, at every index of a vocabulary of 250."""
    seed_B = np.arange(40_000, dtype=np.uint64)
    count = np.bincount(draws(seed_B, np.zeros(40_000, dtype=np.int32), torch.full((250,), 1 / 250)), minlength=250)
    assert abs(chi_square(count, np.full(250, 160.0))) < 5
