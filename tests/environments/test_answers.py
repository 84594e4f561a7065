from __future__ import annotations

import math
from typing import Any

import pytest

from aligner.environments.answers import WrongAnswerError, final_of, same_as_before, seconds_of, thread_of, turn_of
from aligner.environments.protocol import Turn

SAID = [{"role": "user", "content": "x"}]


def test_a_turn() -> None:
    assert turn_of({}) == Turn([])
    whole = {
        "messages": SAID,
        "done": True,
        "reward": 1,
        "metrics": {"a": True, "b": math.inf, "c": 10**400},
        "tools": [{}],
        "replaces": True,
    }
    assert turn_of(whole) == Turn(SAID, True, 1.0, {"a": 1.0}, [{}], True)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "a turn is a NoneType"),
        ([], "a turn is a list"),
        ({"messages": "x"}, "messages are a str"),
        ({"messages": ["x"]}, "a message is a str"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role is"),
        ({"messages": [{"role": "user"}]}, "content is a NoneType"),
        ({"done": 1}, "done is 1"),
        ({"replaces": "no"}, "replaces is 'no'"),
        ({"reward": True}, "the reward is True"),
        ({"reward": "1"}, "not a number"),
        ({"reward": math.nan}, "the reward is nan"),
        ({"reward": -(10**400)}, "the reward is -inf"),
        ({"metrics": [1]}, "metrics"),
        ({"metrics": {"a": "b"}}, "metrics"),
        ({"tools": {}}, "tools"),
    ],
)
def test_wrong_turns(answer: Any, why: str) -> None:
    with pytest.raises(WrongAnswerError, match=why):
        turn_of(answer)


def test_a_final_reward() -> None:
    assert final_of({"reward": None}) == (None, {})
    assert final_of({"reward": 2, "metrics": {"a": 1}}) == (2.0, {"a": 1.0})
    for wrong in (3.0, {"reward": [1]}, {"reward": -math.inf}):
        with pytest.raises(WrongAnswerError):
            final_of(wrong)


def test_metrics_may_differ_in_a_replay() -> None:
    first = Turn(SAID, reward=1.0, metrics={"seconds": 1.0})
    assert same_as_before(first) == same_as_before(Turn(SAID, reward=1.0))
    assert same_as_before(first) != same_as_before(Turn(SAID, reward=0.5))
    assert same_as_before(first) != same_as_before(Turn(SAID, True, 1.0))


def test_a_turn_that_is_nested_too_deeply_is_wrong() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(WrongAnswerError, match="nested too deeply"):
        same_as_before(Turn([{**SAID[0], "parts": nested}]))


@pytest.mark.parametrize("begun", [None, 3, "abc", [1, 2], [1, 2, "3"], [1.0, 2, 3]])
def test_a_forged_thread_is_none(begun: Any) -> None:
    assert thread_of({"begun": begun}) == ()
    assert thread_of({"begun": [1, 2, 3]}) == (1, 2, 3)


@pytest.mark.parametrize("seconds", [None, "x", -1.0, math.inf, math.nan, 3])
def test_forged_seconds_are_none(seconds: Any) -> None:
    assert seconds_of({"seconds": seconds}) == 0.0
    assert seconds_of({"seconds": 2.5}) == 2.5
