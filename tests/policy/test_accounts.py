"""A loss's mean over the global batch and what an update reports, worked by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.objective.losses import clipped_surrogate, reinforce
from aligner.policy.accounts import account_work, gather_metrics, means, over_steps
from aligner.policy.config import PolicyConfig
from aligner.policy.global_mean import Totals, global_mean, rows_together, takes_one_step

MASK_BT = torch.tensor([[False, True, True], [False, False, False], [False, True, False]])
TOTALS = Totals(tokens=6.0, rows=4.0)
"""Of a batch of which the rows above are a part."""


def test_a_loss_per_row_is_the_mean_over_rows_with_a_trained_token() -> None:
    loss_B = torch.tensor([2.0, float("nan"), 6.0])
    assert global_mean(loss_B, MASK_BT, TOTALS, PolicyConfig(), 0).item() == 2.0  # (2 + 6) / 4


def test_a_loss_per_token_follows_the_reduction() -> None:
    loss_BT = torch.tensor([[9.0, 1.0, 2.0], [9.0, 9.0, 9.0], [9.0, 3.0, 9.0]])
    found = {
        kind: global_mean(loss_BT, MASK_BT, TOTALS, PolicyConfig(reduction=kind), 5).item()
        for kind in ("token_mean", "sequence_mean", "fixed")
    }
    # 6 / 6; (1.5 + 3) / 4; 6 / (5 x 4)
    assert found == pytest.approx({"token_mean": 1.0, "sequence_mean": 1.125, "fixed": 0.3})


def test_metrics_of_either_form() -> None:
    sums: dict[str, Tensor] = {}
    of_tokens = torch.tensor([[9.0, 1.0, 2.0], [9.0, 9.0, 9.0], [9.0, 3.0, 9.0]])
    gather_metrics(sums, {"kl": of_tokens, "gap": torch.tensor([1.0, 9.0, -3.0])}, MASK_BT)
    gather_metrics(sums, {"kl": torch.tensor([[0.0, 5.0]]), "gap": torch.tensor([0.5])}, torch.tensor([[False, True]]))
    gather_metrics(sums, {"kl": torch.tensor([[8.0]]), "gap": torch.tensor([8.0])}, torch.tensor([[False]]))
    found = means({name: value.item() for name, value in sums.items()}, TOTALS)
    # kl: (1 + 2 + 3 + 5) / 6 tokens; gap: (1 - 3 + 0.5) / 4 rows
    assert found == pytest.approx({"kl": 11 / 6, "kl_max": 5.0, "gap": -1.5 / 4, "gap_max": 1.0})


def test_padding_by_hand() -> None:
    sums: dict[str, Tensor] = {}
    # a row of 19 shares the call of four of 20, one of 5 not that of 10; sequence parallelism and empty microbatches
    account_work(sums, 99, [(20, 20, 20, 20, 19), (1,), (2,)])
    account_work(sums, 15, [(10, 5)])
    found = means({name: value.item() for name, value in sums.items()}, TOTALS)
    assert found == pytest.approx({"padding": 1 - (99 + 15) / (100 + 1 + 2 + 15)})


def test_one_row_over_the_steps() -> None:
    steps = [
        {"loss": 1.0, "gap": 0.1, "kl_max": 2.0, "tokens": 3.0},
        {"loss": 3.0, "gap": 0.5, "kl_max": 1.0, "tokens": 4.0},
    ]
    assert over_steps(steps) == {"loss": 2.0, "gap": 0.1, "kl_max": 2.0, "tokens": 7.0}


def test_rows_together_is_found_under_partials() -> None:
    def pairs(score_B: Any, *, mask_BT: Any, one: int, two: int) -> None: ...

    assert rows_together(pairs) == 1  # type: ignore[arg-type]
    pairs.rows_together = 2  # type: ignore[attr-defined]
    assert rows_together(functools.partial(functools.partial(pairs, one=1), two=2)) == 2  # type: ignore[arg-type]


def test_a_loss_without_a_ratio_is_known_under_partials() -> None:
    assert takes_one_step(functools.partial(reinforce, kl_coef=0.0))
    assert not takes_one_step(functools.partial(clipped_surrogate, clip_low=0.1))
