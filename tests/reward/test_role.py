"""The reward role on real ranks: the same rewards however the batch is cut, and an audit that ranks make alike."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligner.data.column_addition import write_tokenizer
from aligner.reward.missing import MissingScores, check_missing, missing_of
from aligner.reward.worker import Score, Status
from tests.conftest import Ranks

RULES = """
import math, time
from aligner.reward.rules import Unparsable

def value(prompt, response, **fields):
    if response.startswith("9"): raise Unparsable("begins with 9")
    if response.startswith("8"): raise KeyError("begins with 8")
    return 0.1 * int(response) + math.sqrt(int(response))

def ended(prompt, response, **fields): return float(response.endswith("<eos>"))

def even(prompt, response, **fields): return float(int(response) % 2 == 0)
"""
EACH = {"seen": {"rule": "ended", "keep_special_tokens": True}, "unsaid": {"rule": "ended", "weight": 0}}
RESPONSES = ["1", "22", "333", "4444", "55555", "666", "71", "9", "12", "1234", "2", "3", "80", "4", "517", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    write_tokenizer(folder)
    (folder / "rules.py").write_text(RULES)
    return folder


def components(folder: Path) -> dict[str, Any]:
    return {
        "value": {"rule": f"{folder}/rules.py:value", "weight": 0.7, "normalize": "batch", "clip": [0.0, 60.0]},
        "even": {
            "rule": f"{folder}/rules.py:even",
            "weight": 2.0,
            "gate": "head",
            "gate_above": 0.2,
            "gate_value": -0.5,
        },
        "head": {"model": True, "weight": -0.3, "normalize": "batch"},
        "taste": {"model": "taste", "weight": 0.25, "gate": "even", "gate_value": 0.125},
    }


@pytest.fixture
def scored(ranks: Ranks, folder: Path) -> Callable[..., Any]:
    """scored(reward, responses, ranks): what every rank of 3 found, all the same; the text of its error where it has one."""

    numbers = itertools.count()

    def score_on_ranks(
        reward: dict[str, Any], responses: list[str], of: list[int], episode_rewards: list[float] | None = None
    ) -> Any:
        case = {"reward": reward, "responses": responses, "ranks": of}
        if episode_rewards is not None:
            case["episode_rewards"] = episode_rewards
        found = ranks(3).run(
            "tests.reward.role_on_ranks:score", folder / "tokenizer.json", f"case{next(numbers)}", case
        )
        assert len({json.dumps(one) for one in found}) == 1  # to the last bit, as text, so that NaN is NaN
        return found[0]

    return score_on_ranks


def expected(head: np.ndarray, taste: np.ndarray) -> np.ndarray:
    """By numpy in float64 from the definitions, given the raw scores of two reward models."""
    number = np.array([float(text) for text in RESPONSES])
    value = np.clip(np.float32(0.1 * number + np.sqrt(number)).astype(np.float64), 0, 60)
    value[[text[0] in "89" for text in RESPONSES]] = math.nan
    value = (value - np.nanmean(value)) / np.nanstd(value)
    is_even = (number % 2 == 0).astype(float)
    even = np.where(head > 0.2, is_even, -0.5)
    tasted = np.where(is_even > 0, taste, 0.125)
    return 0.7 * value + 2.0 * even - 0.3 * (head - np.nanmean(head)) / np.nanstd(head) + 0.25 * tasted


LAYOUTS = {"one": [0], "two": [0, 1], "three": [0, 1, 2], "other": [1]}


def test_the_rewards_of_episodes_beside_a_rule_on_their_last_turns(scored: Callable[..., Any], folder: Path) -> None:
    """A failed episode has no reward, and is counted as a rule's failure is; rules see how episodes ended."""
    rewards = [0.5, math.nan, -1.0, 2.0]
    (folder / "seen.py").write_text(
        "def seen(prompt, response, episode, **fields):\n"
        "    assert len(response) == 1 and episode['ended'] == 'timeout'\n"
        "    return float(response) + 0.001 * episode['row']\n"
    )
    reward = {
        "components": {
            "game": {"environment": True},
            "seen": {"rule": f"{folder}/seen.py:seen", "weight": 10.0},
        }
    }
    for ranks_of in ([0], [0, 1]):
        found = scored(reward, ["12", "345", "67", "888"], ranks_of, rewards)
        last = [2.0, 5.001, 7.002, 8.003]
        expected_B = [a + 10 * b for a, b in zip(rewards, last, strict=True)]
        assert [float.fromhex(value) for value in found["reward"]] == pytest.approx(expected_B, nan_ok=True)
        assert found["status"] == [Status.OK, Status.FAILED, Status.OK, Status.OK]
        assert found["row"]["reward/game_failed"] == 1.0
        assert found["components"]["seen"] == pytest.approx([2.0, math.nan, 7.002, 8.003], nan_ok=True)
    rule_alone = {"rule": f"{folder}/seen.py:seen"}
    found = scored(rule_alone, ["12", "345", "67", "888"], [0, 1], rewards)
    assert found["status"] == [Status.OK, Status.FAILED, Status.OK, Status.OK], "never what the rule says of a failure"
    said = scored({**reward, "max_missing": 0.0}, ["12", "345", "67", "888"], [0, 1, 2], rewards)
    assert "the episode ended as timeout a step" in said
    said = scored({"components": {"game": {"environment": True}}}, ["12", "345"], [0, 1, 2])
    assert "components.game.environment=true reads the rewards of episodes" in said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_under_any_layout(layout: str, scored: Callable[..., Any], folder: Path) -> None:
    found = scored({"components": components(folder)}, RESPONSES, LAYOUTS[layout])
    check_rewards(found)
    by_prompt: dict[int, list[str]] = {}
    for row, value in enumerate(found["reward"]):  # rows 2i and 2i + 1 are samples of prompt i
        if value != "nan":
            by_prompt.setdefault(row // 2, []).append(value)
    assert found["by_prompt"] == by_prompt, "of all ranks, each row once"
    assert json.dumps(found) == json.dumps(scored({"components": components(folder)}, RESPONSES, [0]))


def test_too_many_rows_without_a_reward_stop_it(scored: Callable[..., Any], folder: Path) -> None:
    said = scored({"components": components(folder), "max_missing": 0.1}, RESPONSES, [0, 1, 2])
    for words in (
        "3 of 16 rows have no reward (",
        "more than reward.max_missing=0.1",
        f"reward.components.value.rule={folder}/rules.py:value: ",
        "1 unparsable: begins with 9",
        "begins with 8",
        "reward.components.head.model=true: 1 failed: the reward model returned nan",
    ):
        assert words in said, (words, said)


def test_no_row_with_a_reward_stops_it(scored: Callable[..., Any], folder: Path) -> None:
    said = scored({"rule": f"{folder}/rules.py:value", "max_missing": 1.0}, ["9", "91", "8", "9"], [0, 1, 2])
    assert "4 of 4 rows have no reward (3 unparsable, 1 failed), so there is nothing to train on" in said
    for words in ("reward.max_missing=1.0", "KeyError at rules.py:", "begins with 9"):
        assert words in said


@pytest.mark.parametrize(
    ("reward", "values", "shown"),
    [
        ({"rule": "ended"}, {"ended": [0.0, 0.0]}, ["1", "2"]),
        ({"rule": "ended", "keep_special_tokens": True}, {"ended": [1.0, 0.0]}, ["1<eos>", "2"]),
        ({"components": EACH}, {"seen": [1.0, 0.0], "unsaid": [0.0, 0.0]}, ["1", "2"]),
        (
            {
                "components": {**EACH, "not": {"rule": "ended", "keep_special_tokens": False}},
                "keep_special_tokens": True,
            },
            {"seen": [1.0, 0.0], "unsaid": [1.0, 0.0], "not": [0.0, 0.0]},
            None,
        ),
    ],
    ids=["hidden", "kept", "each", "all"],
)
def test_special_tokens(
    reward: dict[str, Any], values: dict[str, Any], shown: list[str] | None, scored: Callable[..., Any], folder: Path
) -> None:
    """A rule that looks for the end token, with and without special tokens; several components that want either."""
    text = json.dumps(reward).replace('"rule": "', f'"rule": "{folder}/rules.py:')
    found = scored(json.loads(text), ["1<eos>", "2"], [0, 1])
    assert found["components"] == values
    assert shown is None or found["response"] == shown


def check_rewards(one: dict[str, Any]) -> None:
    assert one["response"] == RESPONSES
    reward_B = np.array([float.fromhex(value) for value in one["reward"]])
    head, taste = (np.array(one["components"][name]) for name in ("head", "taste"))
    assert np.nanmax(np.abs(head - taste)) > 0.1, "each reward model's own scores"
    wanted = expected(head, taste)
    np.testing.assert_allclose(reward_B, wanted, rtol=1e-5, atol=1e-6)
    lost = {7: Status.UNPARSABLE, 12: Status.FAILED, 4: Status.FAILED}  # "9", "80"; "55555" is the row of 7 tokens
    assert {row: status for row, status in enumerate(one["status"]) if status} == lost
    assert sorted(lost) == np.flatnonzero(np.isnan(reward_B)).tolist() == np.flatnonzero(np.isnan(wanted)).tolist()
    row = one["row"]
    kinds = ("reward_ok", "reward/value_failed", "reward/value_unparsable", "reward/head_failed")
    assert [row[kind] for kind in kinds] == [13, 1, 1, 1]
    assert row["reward"] == pytest.approx(float(np.nanmean(wanted)), rel=1e-5)
    assert row["reward/even"] == pytest.approx(np.mean([int(text) % 2 == 0 for text in RESPONSES]))


def lost(status: Status, detail: str) -> Score:
    return Score(math.nan, status, 0.0, detail)


def test_three_different_examples_of_each_kind() -> None:
    scores = [Score(1.0, Status.OK, 0.0), *(lost(Status.FAILED, f"f{i // 2}") for i in range(10))]
    found = missing_of([*scores, lost(Status.TIMEOUT, "late")])
    assert str(found) == "10 failed: f0 | f1 | f2; 1 timeout: late"
    other = missing_of([lost(Status.TIMEOUT, "late"), lost(Status.TIMEOUT, "later")])
    found.update(other)
    assert str(found) == "10 failed: f0 | f1 | f2; 3 timeout: late | later"


@pytest.mark.parametrize(
    ("status", "max_missing", "stops"),
    [([0, 0], 0.0, False), ([0, 1], 0.5, False), ([0, 1], 0.49, True), ([2, 3], 1.0, True), ([], 0.0, False)],
)
def test_where_the_limit_is(status: list[int], max_missing: float, stops: bool) -> None:
    found = {"reward.rule=r": MissingScores()}
    if stops:
        with pytest.raises(ValueError, match="rows have no reward"):
            check_missing(status, found, max_missing)
    else:
        check_missing(status, found, max_missing)
