"""A loss's mean over the global batch and what an update reports, worked by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.objective.losses import clipped_surrogate, reinforce
from aligner.objective.preference import dpo, kto
from aligner.trainer.config import PolicyConfig
from aligner.trainer.loss_mean import Totals, counted, global_mean, rows_together, takes_one_step
from aligner.trainer.prefix_attention import attended
from aligner.trainer.update_metrics import StepReport, add_work, gather_metrics, over_steps

MASK_BT = torch.tensor([[False, True, True], [False, False, False], [False, True, False]])
TOTALS = Totals(tokens=6.0, rows=4.0)
"""Of a batch of which the rows above are a part."""


def report(sums: dict[str, Tensor], totals: Totals = TOTALS, **own: float) -> StepReport:
    return StepReport({name: value.item() for name, value in sums.items()}, totals, own)


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
    found = over_steps([report(sums)])
    # kl: (1 + 2 + 3 + 5) / 6 tokens; gap: (1 - 3 + 0.5) / 4 rows
    assert found == pytest.approx({"kl": 11 / 6, "kl_max": 5.0, "gap": -1.5 / 4, "gap_max": 1.0, "tokens": 6.0})


@pytest.mark.parametrize("shape", [(3, 4), (3, 2), (4, 3), (2,), (4,), (), (9, 1)], ids=str)
def test_a_metric_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'kl' of a loss has shape .* must have"):
        gather_metrics({}, {"kl": torch.zeros(shape)}, MASK_BT)


def separate(lengths: tuple[int, ...]) -> int:
    return attended(lengths, (-1,) * len(lengths))


def test_padding_by_hand() -> None:
    sums: dict[str, Tensor] = {}
    # a row of 19 shares the call of four of 20, one of 5 not that of 10; sequence parallelism and empty microbatches
    add_work(sums, 99, 99, sum(map(separate, [(20, 20, 20, 20, 19), (1,), (2,)])))
    add_work(sums, 15, 15, separate((10, 5)))
    more: dict[str, Tensor] = {}
    add_work(more, 7, 7, separate((9,)))
    assert over_steps([report(sums)])["padding"] == pytest.approx(1 - (99 + 15) / (100 + 1 + 2 + 15))
    # of both steps together, not the mean of their shares
    assert over_steps([report(sums), report(more)])["padding"] == pytest.approx(1 - (99 + 15 + 7) / (118 + 9))


def test_shared_tokens_are_not_padding() -> None:
    sums: dict[str, Tensor] = {}
    # three rows of 12, 14 and 14 begin with the same 10; a row of 2 does not share the call of those of 4
    add_work(sums, 40, 20, attended((10, 2, 4, 4), (-1, 0, 0, 0)))
    add_work(sums, 60, 60, 61)
    metrics = over_steps([report(sums)])
    assert metrics["padding"] == pytest.approx(1 - 80 / 81)
    assert metrics["shared_prefix"] == pytest.approx(20 / 100)


def test_means_over_steps_of_unequal_size() -> None:
    """A minibatch of 1 row of 1 token, one of 2 rows of 4 and 5: means are over the 10 tokens, or the 3 rows."""
    steps = []
    for rows in ([[4.0]], [[1.0, 1.0, 0.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0]]):
        mask_BT = torch.tensor([[t < len(row) for t in range(5)] for row in rows])
        value_BT = torch.tensor([row + [9.0] * (5 - len(row)) for row in rows])
        sums: dict[str, Tensor] = {}
        metrics = {"staleness": value_BT, "clip_fraction": value_BT / 8, "gap": value_BT, "margin": value_BT[:, 0]}
        gather_metrics(sums, metrics, mask_BT)
        sums["sum/loss"] = torch.tensor(float(len(rows)))
        steps.append(report(sums, Totals(float(mask_BT.sum()), len(rows)), grad_norm=3.0 * len(rows), lr=0.5))
    assert over_steps(steps) == pytest.approx(
        {
            "staleness": (4 + 1 + 1 + 0 + 2 + 1 + 2 + 3 + 4 + 5) / 10, "staleness_max": 5.0,
            "clip_fraction": 23 / 80, "gap": 4.0, "gap_max": 4.0, "margin": (4 + 1 + 1) / 3,
            "loss": 1.5, "grad_norm": 4.5, "lr": 0.5, "tokens": 10.0,
        }
    )  # fmt: skip


def test_steps_that_were_left_out_are_counted_and_weigh_nothing() -> None:
    sums = {"token/kl": torch.tensor(6.0), "sum/loss": torch.tensor(1.0)}
    bad = {"token/kl": torch.tensor(torch.inf), "sum/loss": torch.tensor(torch.nan)}
    taken, skipped = report(sums, grad_norm=1.0, lr=0.1), report(bad, grad_norm=torch.inf, skipped_steps=1.0)
    empty = report({}, Totals(0.0, 0.0), empty_steps=1.0)
    row = {"kl": 1.0, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1}
    assert over_steps([taken, skipped, empty]) == {"skipped_steps": 1.0, "empty_steps": 1.0, **row, "tokens": 12.0}
    alone = over_steps([skipped, empty])
    assert alone["kl"] == torch.inf and alone["loss"] != alone["loss"] and "lr" not in alone
    assert over_steps([empty, empty]) == {"empty_steps": 2.0, "tokens": 0.0}


def test_a_pair_of_which_one_row_has_nothing_counts_nowhere() -> None:
    """Neither row, in the loss as in the metrics; a loss whose rows stand alone keeps the one that has something."""
    mask_BT = torch.tensor([[True, True], [False, True], [False, False], [True, True], [True, False], [False, True]])
    preference_B = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 0.0])
    both = [True, True, False, False, False, False]
    assert counted(dpo, mask_BT, {"preference_B": preference_B, "other": 1}).any(1).tolist() == both
    assert counted(functools.partial(dpo, beta=1.0), mask_BT[:4], {}).any(1).tolist() == both[:4]
    assert counted(kto, mask_BT, {}).equal(mask_BT)


def test_rows_together_is_found_under_partials() -> None:
    def pairs(score_B: Any, *, mask_BT: Any, one: int, two: int) -> None: ...

    assert rows_together(pairs) == 1  # type: ignore[arg-type]
    pairs.rows_together = 2  # type: ignore[attr-defined]
    assert rows_together(functools.partial(functools.partial(pairs, one=1), two=2)) == 2  # type: ignore[arg-type]


def test_a_loss_without_a_ratio_is_known_under_partials() -> None:
    assert takes_one_step(functools.partial(reinforce, kl_coef=0.0))
    assert not takes_one_step(functools.partial(clipped_surrogate, clip_low=0.1))
