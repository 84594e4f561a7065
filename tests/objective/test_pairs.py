"""Pairs: which row is the chosen one, there and back."""

import math

import torch

from aligner.objective.pairs import pair_rows, pairwise_loss
from aligner.objective.preference import dpo, ipo, kto, orpo, robust_dpo, simpo
from aligner.objective.reward_model import bradley_terry


def test_there_and_back() -> None:
    preference_B = torch.tensor([1.0, -1, -1, 1, 0, 0, -1, 1])
    mask_BT = torch.tensor([[1], [1], [1], [1], [1], [1], [1], [0]], dtype=torch.bool)
    pairs = pair_rows(8, mask_BT, preference_B, preference_B.device)
    chosen_P, rejected_P = pairs.split(torch.arange(8.0))
    assert chosen_P.tolist() == [0, 3, 0, 0] and rejected_P.tolist() == [1, 2, 0, 0]
    assert pairs.join(torch.tensor([5.0, 6.0, math.nan, math.nan]), torch.float32).tolist() == [5, 5, 6, 6, 0, 0, 0, 0]
    assert pairs.counted_B.tolist() == [True] * 4 + [False] * 4
    # Without preferences the first row is the chosen one; rows need not lie together in memory.
    pairs = pair_rows(4, None, None, preference_B.device)
    assert [value_P.tolist() for value_P in pairs.split(torch.arange(8.0)[::2])] == [[0, 4], [2, 6]]


def test_the_losses_of_pairs_say_so() -> None:
    for loss in (dpo, robust_dpo, ipo, orpo, simpo, bradley_terry):
        assert loss.rows_together == 2
    assert not hasattr(kto, "rows_together")

    def mine() -> None: ...

    assert pairwise_loss(mine) is mine
