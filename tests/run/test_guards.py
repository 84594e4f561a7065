"""Guards on rows made by hand: what fires, when, how often it is said, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from aligner.bounds import check_settings
from aligner.config.guards import EmptyBatch, GuardConfig, Limit, Streak
from aligner.run.guards import Finding, Guards

FINE = {
    "reward": 0.5,
    "kl": 0.01,
    "gap": 1e-3,
    "tokens": 100.0,
    "advantage_abs_max": 1.5,
    "loss": 0.1,
    "grad_norm": 1.0,
}


def rows(*changes: dict[str, float]) -> list[dict[str, float]]:
    """Rows of a run in which nothing is wrong but what is said."""
    return [{**FINE, "reward": 0.1 + 0.01 * number, **change} for number, change in enumerate(changes)]


def fired(config: GuardConfig, *changes: dict[str, float]) -> list[list[str]]:
    guards = Guards(config)
    return [[one.guard for one in guards.look(step, row)] for step, row in enumerate(rows(*changes), start=1)]


def test_a_run_in_which_nothing_is_wrong() -> None:
    assert fired(GuardConfig(), *[{}] * 200) == [[]] * 200


def test_a_row_of_another_kind_of_loop_says_nothing() -> None:
    guards = Guards(GuardConfig(kl=Limit("stop", 1.0), stuck_reward=Streak("stop", 1)))
    assert [guards.look(step, {"loss": 2.0, "lr": 1e-3}) for step in range(1, 9)] == [[]] * 8


@pytest.mark.parametrize(("name", "metric"), [("kl", "kl"), ("logp_gap", "gap")])
def test_a_limit(name: str, metric: str) -> None:
    config = replace(GuardConfig(), **{name: Limit("stop", limit=2.0)})
    assert fired(config, {metric: 2.0}, {metric: 2.01}, {metric: 0.0}, {metric: math.nan}, {metric: math.inf}) == [
        [],
        [name],
        [],
        [name],
        [name],
    ]
    config = replace(GuardConfig(), **{name: Limit("warn", limit=2.0, steps=3)})
    above = {metric: 5.0}
    assert fired(config, above, above, {}, above, above, above, above) == [[], [], [], [], [], [name], [name]]


def test_messages_name_the_setting_the_value_and_the_step() -> None:
    (found,) = Guards(GuardConfig(kl=Limit("stop", limit=2.0))).look(7, {"kl": 3.25})
    assert found.stop and found.say
    for words in ("guards.kl", "3.25 nats", "guards.kl.limit=2", "step 7"):
        assert words in found.text, found.text
    (found,) = Guards(GuardConfig(zero_advantages=Streak("warn", 1))).look(3, {"advantage_abs_max": 0.0})
    assert not found.stop and "guards.zero_advantages" in found.text and "step 3" in found.text


def test_advantages_of_zero_some_steps_in_a_row() -> None:
    config, zero = GuardConfig(zero_advantages=Streak("warn", steps=3)), {"advantage_abs_max": 0.0}
    assert fired(config, zero, zero, {}, zero, zero, zero, zero) == [
        *[[]] * 5,
        ["zero_advantages"],
        ["zero_advantages"],
    ]


def test_a_reward_that_does_not_move() -> None:
    config, same = GuardConfig(stuck_reward=Streak("stop", steps=3)), {"reward": 0.25}
    # the first of five equal ones repeats nothing
    assert fired(config, *[same] * 5, {"reward": 0.26}, same) == [*[[]] * 3, ["stuck_reward"], ["stuck_reward"], [], []]
    missing = {"reward": math.nan}
    assert fired(config, same, same, missing, same, same) == [*[[]] * 4, ["stuck_reward"]], "no reward is no change"


@pytest.mark.parametrize("change", [{"tokens": 0.0, "empty_steps": 1.0}, {"tokens": 0.0}, {"empty_steps": 1.0}])
def test_batches_without_a_trained_token(change: dict[str, float]) -> None:
    for action in ("skip", "warn", "stop"):
        found = Guards(GuardConfig(empty_batch=EmptyBatch(action))).look(1, {**FINE, **change})
        assert [(one.guard, one.stop) for one in found] == [("empty_batch", action == "stop")]
    assert Guards(GuardConfig(empty_batch=EmptyBatch("off"))).look(1, {**FINE, **change}) == []


@pytest.mark.parametrize("metric", ["skipped_steps", "critic_skipped_steps"])
def test_steps_that_the_update_left_out_are_said(metric: str) -> None:
    (found,) = Guards(GuardConfig()).look(4, {**FINE, metric: 2.0})
    assert (found.guard, found.stop) == ("not_finite", False) and "2 optimizer step(s) left out" in found.text


def test_off_is_off() -> None:
    off = GuardConfig(
        kl=Limit("off", 1e-9), logp_gap=Limit("off", 1e-9), empty_batch=EmptyBatch("off"),
        zero_advantages=Streak("off"), stuck_reward=Streak("off"),
    )  # fmt: skip
    wrong = {"kl": 99.0, "gap": 99.0, "tokens": 0.0, "advantage_abs_max": 0.0, "reward": 1.0}
    assert fired(off, *[wrong] * 3) == [[]] * 3


def said(found: list[list[Finding]]) -> list[int]:
    return [step for step, findings in enumerate(found, start=1) if any(one.say for one in findings)]


def test_it_is_said_first_and_then_once_in_so_many_steps() -> None:
    guards = Guards(GuardConfig(kl=Limit("warn", 1.0), say_every=10))
    found = [guards.look(step, {"kl": 2.0}) for step in range(1, 26)]
    assert all(len(findings) == 1 for findings in found), "it is in every row"
    assert said(found) == [1, 11, 21]
    guards = Guards(GuardConfig(kl=Limit("stop", 1.0), say_every=10))
    assert said([guards.look(step, {"kl": 2.0}) for step in range(1, 4)]) == [1, 2, 3]


def test_a_checkpoint_keeps_streaks_and_what_was_said() -> None:
    config = GuardConfig(
        kl=Limit("warn", 1.0), zero_advantages=Streak("warn", 3), stuck_reward=Streak("warn", 4), say_every=10
    )
    wrong: list[dict[str, Any]] = [{"kl": 2.0, "advantage_abs_max": 0.0, "reward": 1.0}] * 20
    whole = Guards(config)
    expected = [whole.look(step, row) for step, row in enumerate(wrong, start=1)]
    assert sum(map(len, expected)) > 40
    for cut in range(1, 19):
        before, after = Guards(config), Guards(config)
        found = [before.look(step, row) for step, row in enumerate(wrong[:cut], start=1)]
        after.restore(json.loads(json.dumps(before.state())))
        found += [after.look(step, row) for step, row in enumerate(wrong[cut:], start=cut + 1)]
        assert found == expected, cut


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GuardConfig(kl=Limit("skip", 1.0)), "guards.kl.action=skip is unknown; use off, warn, stop"),
        (GuardConfig(kl=Limit("False", 1.0)), "quote it"),
        (GuardConfig(kl=Limit("warn", 0.0)), "guards.kl.limit=0.0 must be more than 0"),
        (GuardConfig(kl=Limit("warn", math.nan)), "guards.kl.limit=nan must be more than 0"),
        (GuardConfig(stuck_reward=Streak("warn", 0)), "guards.stuck_reward.steps=0 must be at least 1"),
        (GuardConfig(empty_batch=EmptyBatch("drop")), "use off, skip, warn, stop"),
        (GuardConfig(say_every=0), "guards.say_every=0"),
    ],
)
def test_what_cannot_work_is_refused(config: GuardConfig, words: str) -> None:
    check_settings(GuardConfig(), "guards")
    with pytest.raises(ValueError, match="guards") as error:
        check_settings(config, "guards")
    assert words in str(error.value)
