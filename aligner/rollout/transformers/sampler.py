"""A token for each row of a batch: temperature, top-k, top-p, and noise decided by (seed, place), as tensor operations.

The same processing and, on any device, the same noise as vLLM's on a CPU (`aligner.rollout.vllm.draws`): both engines draw the
same tokens where their logits agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from aligner.rollout.config import Sampling

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
"""SplitMix64's constants as the int64 of the same bits; int64 arithmetic wraps around as uint64's does."""
_NOISE = 1 << 22
"""Elements of noise that are made at once."""


@dataclass(frozen=True)
class RowSampling:
    """How each row is drawn."""

    temperature_B: Tensor
    """float32; 1 in greedy rows."""
    greedy_B: Tensor
    """bool."""
    top_k_B: Tensor
    """int64; the vocabulary's size: all tokens."""
    top_p_B: Tensor
    """float32; 1: all tokens."""
    seed_B: Tensor
    """int64."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], seeds: Sequence[int], vocab: int, device: torch.device) -> Self:
        """Of a batch; a greedy row has no temperature, no top-k and no top-p."""
        greedy = [one.temperature == 0 for one in samplings]
        rows = list(zip(samplings, greedy, strict=True))
        return cls(
            torch.tensor([1.0 if flat else one.temperature for one, flat in rows], device=device),
            torch.tensor(greedy, device=device),
            torch.tensor(
                [vocab if flat or not one.top_k else min(one.top_k, vocab) for one, flat in rows], device=device
            ),
            torch.tensor([1.0 if flat else one.top_p for one, flat in rows], device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
        )

    def select(self, rows_B: Tensor) -> Self:
        """Of these rows."""
        return type(self)(*(getattr(self, one.name)[rows_B] for one in fields(self)))


def draw(logits_BV: Tensor, sampling: RowSampling, place_B: Tensor) -> tuple[Tensor, Tensor]:
    """(a token of each row int64, its log-probability float32 under the distribution drawn from).

    Args:
        place_B: int64, tokens before the drawn one.
    """
    logits_BV = top_k_top_p(logits_BV.float() / sampling.temperature_B[:, None], sampling.top_k_B, sampling.top_p_B)
    token_B = logits_BV.argmax(1)
    if not bool(sampling.greedy_B.all()):
        drawn_B = gumbel_draw(logits_BV, place_seeds(sampling.seed_B, place_B))
        token_B = torch.where(sampling.greedy_B, token_B, drawn_B)
    return token_B, logits_BV.gather(1, token_B[:, None])[:, 0] - logits_BV.logsumexp(1)


def top_k_top_p(logits_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Minus infinity outside the top k tokens (with those equal to the last of them), and then outside the smallest set of
    most likely tokens with probability p."""
    vocab = logits_BV.shape[1]
    limits_k, limits_p = bool((top_k_B < vocab).any()), bool((top_p_B < 1).any())
    if not limits_k and not limits_p:
        return logits_BV
    if limits_k:
        sorted_BV = logits_BV.sort(1).values
        least_B = sorted_BV.gather(1, (vocab - top_k_B)[:, None])
        logits_BV = logits_BV.masked_fill(logits_BV < least_B, -torch.inf)
    if limits_p:
        sorted_BV, token_BV = logits_BV.sort(1)
        below_BV = sorted_BV.softmax(1).cumsum(1)
        outside_BV = below_BV <= 1 - top_p_B[:, None]
        outside_BV[:, -1] = False  # at least the most likely token stays
        logits_BV = sorted_BV.masked_fill(outside_BV, -torch.inf).gather(1, token_BV.argsort(1))
    return logits_BV


def place_seeds(seed_B: Tensor, place_B: Tensor) -> Tensor:
    """As `aligner.rollout.vllm.draws.place_seeds`: a 63-bit hash of (seed of the sample, place of the token), int64."""
    return _shift(_mix(_mix(seed_B) + place_B * _GAMMA), 1)


def gumbel_draw(logits_BV: Tensor, seed_B: Tensor) -> Tensor:
    """A token of each row, drawn with its softmax; some rows at a time, since float64 noise is twice the size of the logits."""
    vocab = logits_BV.shape[1]
    parts = zip(logits_BV.split(max(1, _NOISE // vocab)), seed_B.split(max(1, _NOISE // vocab)), strict=True)
    return torch.cat([(part.double() + gumbel_noise(seed, vocab)).argmax(1) for part, seed in parts])


def gumbel_noise(seed_B: Tensor, vocab: int) -> Tensor:
    """[B, V] float64, standard Gumbel: -log(-log u), where u has 53 random bits, hashed from (seed, token)."""
    index_V = torch.arange(1, vocab + 1, dtype=torch.int64, device=seed_B.device)
    bits_BV = _shift(_mix(_mix(seed_B)[:, None] + index_V * _GAMMA), 11)
    u_BV = (bits_BV.double() + 0.5) * 2.0**-53
    return -(-u_BV.log()).log()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)
