"""The reward role on real ranks: the same rewards however the batch is cut, and an audit that ranks make alike."""

from __future__ import annotations

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


def said_by(torchrun: Callable[..., Any], folder: Path, cases: dict[str, Any]) -> dict[str, list[Any]]:
    """What each of 3 ranks said in each case."""
    job = {"tokenizer": str(folder / "tokenizer.json"), "cases": cases}
    (folder / "job.json").write_text(json.dumps(job))
    done = torchrun(3, [str(Path(__file__).with_name("role_rank.py")), str(folder / "job.json")], seconds=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = {name: [] for name in cases}
    for line in done.stdout.splitlines():
        if line.startswith("said "):
            _, name, text = line.split(" ", 2)
            found[name].append(json.loads(text))
    assert {name: len(of) for name, of in found.items()} == dict.fromkeys(cases, 3)
    for of in found.values():
        assert len({json.dumps(one) for one in of}) == 1  # every rank says the same, to the last bit
    return found


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


def test_on_real_ranks(torchrun: Callable[..., Any], folder: Path) -> None:
    """One job, since its start is most of the time: layouts of the reward role, and batches that must stop it."""
    every = {"reward": {"components": components(folder)}, "responses": RESPONSES, "ranks": [0, 1, 2]}
    layouts = {"one": [0], "two": [0, 1], "three": [0, 1, 2], "other": [1]}
    cases: dict[str, Any] = {name: {**every, "ranks": ranks} for name, ranks in layouts.items()}
    cases["too_many"] = {**every, "reward": {**every["reward"], "max_missing": 0.1}}  # type: ignore[dict-item]
    alone = {"rule": f"{folder}/rules.py:value", "max_missing": 1.0}
    cases["none_left"] = {**every, "reward": alone, "responses": ["9", "91", "8", "9"]}
    cases |= special_token_cases(folder)
    found = {name: of[0] for name, of in said_by(torchrun, folder, cases).items()}
    check_special_tokens(found)
    for name in layouts:
        assert json.dumps(found[name]) == json.dumps(found["one"]), name  # text, so that NaN is NaN
    check_rewards(found["one"])
    for words in (
        "3 of 16 rows have no reward (",
        "more than reward.max_missing=0.1",
        f"reward.components.value.rule={folder}/rules.py:value: ",
        "1 unparsable: begins with 9",
        "begins with 8",
        "reward.components.head.model=true: 1 failed: the reward model returned nan",
    ):
        assert words in found["too_many"], (words, found["too_many"])
    assert "4 of 4 rows have no reward (3 unparsable, 1 failed), so there is nothing to train on" in found["none_left"]
    for words in ("reward.max_missing=1.0", "KeyError at rules.py:", "begins with 9"):
        assert words in found["none_left"]


def special_token_cases(folder: Path) -> dict[str, Any]:
    """A rule that looks for the end token, with and without special tokens; several components that want either."""
    rule = f"{folder}/rules.py:ended"
    each = {"seen": {"rule": rule, "keep_special_tokens": True}, "unsaid": {"rule": rule, "weight": 0}}
    rewards = {
        "hidden": {"rule": rule},
        "kept": {"rule": rule, "keep_special_tokens": True},
        "each": {"components": each},
        "all": {
            "components": {**each, "not": {"rule": rule, "keep_special_tokens": False}},
            "keep_special_tokens": True,
        },
    }
    return {name: {"reward": one, "responses": ["1<eos>", "2"], "ranks": [0, 1]} for name, one in rewards.items()}


def check_special_tokens(found: dict[str, Any]) -> None:
    values = {name: found[name]["components"] for name in ("hidden", "kept", "each", "all")}
    assert values["hidden"] == {"ended": [0.0, 0.0]} and found["hidden"]["response"] == ["1", "2"]
    assert values["kept"] == {"ended": [1.0, 0.0]} and found["kept"]["response"] == ["1<eos>", "2"]
    assert values["each"] == {"seen": [1.0, 0.0], "unsaid": [0.0, 0.0]} and found["each"]["response"] == ["1", "2"]
    assert values["all"] == {"seen": [1.0, 0.0], "unsaid": [1.0, 0.0], "not": [0.0, 0.0]}


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
