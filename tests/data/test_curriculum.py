"""Orders of a curriculum, worked by hand: by a column, by measured success; retired prompts; what resumes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from aligner.data.curriculum import UNMEASURED, CurriculumStream, SuccessRates, prompt_id, ranked
from aligner.data.mixture import MixedSource, Mixture
from aligner.data.mixture_config import CurriculumConfig, MixtureConfig
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.stream import epoch_order
from aligner.data.tokenized_answer import TokenizedAnswer

NAN = float("nan")


def prompts(levels: list[Any]) -> list[Prompt]:
    return [Prompt((i,), str(i), {"level": level}, i) for i, level in enumerate(levels)]


def test_lower_scores_first_and_ties_by_the_seed() -> None:
    scores = np.array([2.0, 1.0, NAN, 1.0, 0.0, 1.0])
    assert ranked(scores, seed=0, epoch=0, shuffle=False) == [4, 1, 3, 5, 0]
    orders = {tuple(ranked(scores, seed=0, epoch=epoch, shuffle=True)) for epoch in range(20)}
    assert len(orders) > 3, "three rows tie"
    assert all(order[0] == 4 and order[-1] == 0 for order in orders)
    ties = [row for row in epoch_order(6, 0, 7) if row in (1, 3, 5)]
    assert ranked(scores, 0, 7, True)[1:4] == ties
    assert ranked(scores, 0, 0, False, fraction=0.5) == [4, 1, 3], "3 of 5, rounded up"
    assert ranked(scores, 0, 0, False, fraction=1e-9) == [4]
    assert len(ranked(np.zeros(100), 0, 0, False, fraction=0.07)) == 7, "though 0.07 * 100 is more in binary"
    assert ranked(np.full(3, NAN), 0, 0, True) == []


@pytest.mark.parametrize(("order", "wanted"), [(None, [1, 3, 0, 2]), ("descending", [2, 0, 3, 1])])
def test_by_a_column(order: str | None, wanted: list[int]) -> None:
    config = CurriculumConfig(by="column", column="level", order=order)
    stream = CurriculumStream(prompts([3, -1, 4.5, 0]), config, seed=0)
    assert [row.index for row in stream.take(8)] == wanted * 2
    assert (stream.epoch, stream.position, stream.metrics()) == (2, 8, {})
    answers = [TokenizedAnswer((1,), (False,), 1, {"level": level}, i) for i, level in enumerate([3, -1, 4.5, 0])]
    assert [row.index for row in CurriculumStream(answers, config, seed=0).take(4)] == wanted
    pairs = CurriculumStream([Pair(answer, answer) for answer in answers], config, seed=0).take(4)
    assert [pair.chosen.index for pair in pairs] == wanted


@pytest.mark.parametrize("value", [None, "3", True, NAN, [1]])
def test_a_row_without_the_column_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^data\.curriculum\.column=level: row 2 of data\.sources\.math has 'level'="):
        CurriculumStream(
            prompts([1, value]), CurriculumConfig(by="column", column="level"), 0, name="data.sources.math"
        )


def test_rates_by_hand() -> None:
    """memory=0.5: 1 of 4, then 3 of 4: (0.5 * 1 + 3) / (0.5 * 4 + 4) = 3.5 / 6."""
    rates = SuccessRates(prompts([0] * 4), CurriculumConfig(by="success", success_reward=0.6))
    rates.record({0: [1.0, 0.5, 0.0, 0.59], 1: [0.6] * 4})
    assert rates.rate_N.tolist() == [0.25, 1.0, UNMEASURED, UNMEASURED]
    rates.record({0: [1, 1, 0, 1]})
    assert rates.rate_N.tolist() == [3.5 / 6, 1.0, UNMEASURED, UNMEASURED]
    assert rates.metrics() == {"curriculum/measured": 2.0, "curriculum/retired": 0.0}
    forgets = SuccessRates(prompts([0] * 2), CurriculumConfig(by="success", memory=0))
    forgets.record({0: [0, 0]})
    forgets.record({0: [1, 0]})
    assert forgets.rate_N.tolist() == [0.5, UNMEASURED]


@pytest.mark.parametrize(
    ("order", "wanted"), [("easiest", [2, 3, 4, 1, 0]), ("hardest", [0, 1, 4, 3, 2]), ("uncertain", [4, 1, 3, 0, 2])]
)
def test_orders_by_success(order: str, wanted: list[int]) -> None:
    """p = 0, 0.4, 1, 0.7, unmeasured (0.5): p (1 - p) = 0, 0.24, 0, 0.21, 0.25."""
    config = CurriculumConfig(by="success", order=order)
    stream = CurriculumStream(prompts([0] * 5), config, seed=0, shuffle=False)
    assert stream.rates is not None
    first = [row.index for row in stream.take(4)]
    assert first == [0, 1, 2, 3], "nothing is measured: the order of the file"
    tens = {0: 0, 1: 4, 2: 10, 3: 7}
    stream.rates.record({index: [1.0] * wins + [0.0] * (10 - wins) for index, wins in tens.items()})
    assert [row.index for row in stream.take(1)] == [4], "the order of an epoch is settled when it begins"
    assert [row.index for row in stream.take(5)] == wanted


def test_rows_that_ask_the_same_are_measured_together() -> None:
    same = [Prompt((7, 8), "a", {}, 0), Prompt((7, 8), "a", {}, 1), Prompt((7,), "b", {}, 2)]
    assert prompt_id(same[0]) == prompt_id(same[1]) != prompt_id(same[2])
    rates = SuccessRates(same, CurriculumConfig(by="success"))
    rates.record({0: [1, 1], 1: [0, 0]})
    assert rates.rate_N.tolist() == [0.5, 0.5, UNMEASURED] and len(rates.state_dict()) == 1
    assert rates.state_dict() == {prompt_id(same[0]): [2.0, 4.0]}


def test_solved_prompts_retire_and_come_back_when_none_are_left() -> None:
    config = CurriculumConfig(by="success", order="hardest", retire_at=0.75)
    stream = CurriculumStream(prompts([0] * 4), config, seed=0, shuffle=False)
    mixed = Mixture([MixedSource("data", stream, 0, 4)], MixtureConfig(), seed=0)
    assert mixed.measures and stream.rates is not None
    mixed.take(4)
    mixed.record({0: [1, 1, 1, 0], 1: [0] * 4, 2: [1] * 4, 3: [1, 0, 1, 0]})
    assert stream.metrics() == {"curriculum/measured": 4.0, "curriculum/retired": 2.0}
    assert [row.index for row in mixed.take(2)] == [1, 3] and stream.epoch == 2
    mixed.record({1: [1] * 12, 3: [1] * 12})
    assert stream.idle and stream.rates.retired_N.all()
    assert [row.index for row in mixed.take(4)] == [0, 1, 3, 2], "all, by 0.75, 12 / 14, 13 / 14, 1"
    assert stream.idle
    mixed.record({2: [0, 0, 0, 0]})
    assert not stream.idle and [row.index for row in mixed.take(1)] == [2], "4 / (2 + 4) = 0.33: not solved any more"


def test_a_source_whose_prompts_are_solved_leaves_its_share_to_the_others() -> None:
    config = CurriculumConfig(by="success", retire_at=1.0)
    streams = [CurriculumStream(prompts([0] * count), config, seed=0) for count in (3, 5)]
    mixed = Mixture([MixedSource("a", streams[0], 0, 3), MixedSource("b", streams[1], 3, 5)], MixtureConfig(), seed=0)
    mixed.take(40)
    mixed.record({index: [1.0] for index in range(3)})
    streams[0].next_epoch()
    assert streams[0].idle
    mixed.metrics()
    mixed.take(40)
    assert mixed.metrics()["source/b_share"] == 1.0


def test_what_was_measured_is_kept_for_prompts_that_are_still_there() -> None:
    config = CurriculumConfig(by="success")
    stream = CurriculumStream(prompts([0] * 3), config, seed=0)
    assert stream.rates is not None
    stream.take(2)
    stream.rates.record({0: [1, 0, 0, 0], 2: [1, 1, 1, 1]})
    state = json.loads(json.dumps(stream.state_dict()))
    other = CurriculumStream([*prompts([0]), Prompt((99,), "new", {}, 1)], config, seed=0)
    with pytest.raises(ValueError, match="rows=3 but this run has rows=2"):
        other.load_state_dict(state)
    other.load_state_dict(state, accept_changes=True)
    assert other.rates is not None and other.rates.rate_N.tolist() == [0.25, UNMEASURED]
    assert (other.epoch, [row.index for row in other.take(2)]) == (1, [1, 0])
