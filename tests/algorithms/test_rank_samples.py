"""The pairs that ranked samples become, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aligner.algorithms.rank_samples import best_and_worst, truncate_output

NAN = math.nan


def ranked(*groups: list[float], response: list[str] | None = None) -> list[dict[str, Any]]:
    rewards = [reward for group in groups for reward in group]
    fields = [{"prompt": f"p{n}", "answer": "1"} for n, group in enumerate(groups) for _ in group]
    texts = response or [f"r{row}" for row in range(len(rewards))]
    return best_and_worst(torch.tensor(rewards), texts, fields, len(groups[0]))


def test_the_best_and_the_worst_of_each_group_with_the_prompt_s_fields() -> None:
    assert ranked([0.5, 2.0, -1.0], [0.0, 0.0, 1.0]) == [
        {"prompt": "p0", "answer": "1", "chosen": "r1", "rejected": "r2", "score_chosen": 2.0, "score_rejected": -1.0},
        {"prompt": "p1", "answer": "1", "chosen": "r5", "rejected": "r3", "score_chosen": 1.0, "score_rejected": 0.0},
    ]


def test_of_equal_rewards_the_first_counts() -> None:
    (pair,) = ranked([0.0, 1.0, 0.0, 1.0])
    assert (pair["chosen"], pair["rejected"]) == ("r1", "r0")


def test_groups_without_a_difference_are_left_out() -> None:
    assert ranked([1.0, 1.0], [NAN, NAN], [NAN, 1.0]) == []


def test_a_row_without_a_reward_is_in_no_pair() -> None:
    (pair,) = ranked([NAN, 1.0, 3.0, NAN, 2.0])
    assert (pair["chosen"], pair["rejected"]) == ("r2", "r1")


def test_an_empty_answer_is_in_no_pair() -> None:
    assert ranked([0.0, 1.0], response=[" ", "a"]) == []


def test_a_run_that_goes_on_writes_after_what_its_checkpoint_knows(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    truncate_output(out, 0)
    assert out.read_bytes() == b""
    out.write_bytes(b"known\nlater\n")
    truncate_output(out, 6)
    assert out.read_bytes() == b"known\n"
    with pytest.raises(ValueError, match="has 6 bytes, and had 99"):
        truncate_output(out, 99)
    truncate_output(out, 0)
    assert out.read_bytes() == b""
