"""pass@k against the average over all subsets of k samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from aligner.objective.pass_at_k import pass_at_k

SUCCESS = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_is_the_share_of_subsets_with_a_success(k: int) -> None:
    shares = [sum(any(subset) for subset in itertools.combinations(row, k)) / math.comb(len(row), k) for row in SUCCESS]
    assert pass_at_k(torch.tensor(SUCCESS, dtype=torch.float32), k) == pytest.approx(sum(shares) / len(shares))


def test_samples_without_a_result_do_not_count() -> None:
    nan = math.nan
    success_PG = torch.tensor([[1.0, nan, 0.0], [nan, nan, 1.0]])
    assert pass_at_k(success_PG, 1) == pytest.approx((0.5 + 1.0) / 2)
    assert pass_at_k(success_PG, 2) == 1.0  # of the first prompt alone
    assert math.isnan(pass_at_k(success_PG, 3))
