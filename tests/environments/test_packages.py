"""Environments of packages, unmodified, each in a virtual environment of its own; see packages.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aligner.environments.pool import Action, EnvironmentPool, Failed, Finished, Opened, PoolEvent, Stepped
from tests.environments.drive import contents, failure, play, pool
from tests.environments.packages import interpreter, served

pytestmark = [pytest.mark.environments, pytest.mark.timeout(900)]
HERE = Path(__file__).parent


def play_actions(
    made: EnvironmentPool, actions: Sequence[Action], row: dict[str, Any] | None = None, seed: int = 0
) -> list[PoolEvent]:
    """One episode of fixed actions."""
    made.open(0, row or {}, seed)
    events: list[PoolEvent] = []
    while not events or not isinstance(events[-1], Finished | Failed):
        new = made.poll(60.0)
        assert new, f"no event after {events}"
        events += new
        said = len(events) - 1
        last = events[-1]
        if isinstance(last, Opened | Stepped):
            if said < len(actions) and not last.turn.done:
                made.step(0, actions[said])
            else:
                made.finish(0)
    return events


def test_skyrl_gym() -> None:
    row = {
        "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
        "reward_spec": {"ground_truth": "4"},
        "max_turns": 3,
    }
    with pool(target="gsm8k_multi_turn", kind="skyrl_gym", python=interpreter("games")) as made:
        events = play(made, {0: ["let me think", "#### 4"], 1: ["let me think", "still", "#### 5"]}, {0: row, 1: row})
    for number, final in ((0, 1.0), (1, 0.2 / 3)):  # the package pays 0.2 for the form, over all turns
        turns = [event.turn for event in events[number] if isinstance(event, Stepped)]
        assert [turn.done for turn in turns] == [False] * (len(turns) - 1) + [True]
        assert len(turns) == number + 2 and turns[-1].reward == final
        assert "####" in contents(events[number])[0]  # the package's own request for an answer


def test_skyrl_gym_reward_as_the_package_gives_it() -> None:
    row = {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "reward_spec": {"ground_truth": "4"}}
    with pool(target="gsm8k", kind="skyrl_gym", python=interpreter("games")) as made:
        events = play(made, {0: ["#### 4"], 1: ["#### 5"]}, {0: row, 1: row})
    assert [events[number][1].turn.reward for number in (0, 1)] == [1.0, 0.0]  # type: ignore[union-attr]


def test_reasoning_gym() -> None:
    settings: dict[str, Any] = {"target": "chain_sum", "kind": "reasoning_gym", "python": interpreter("games")}
    with pool(options={"min_terms": 2, "max_terms": 2}, **settings) as made:
        question = contents(play_actions(made, [Action("")], seed=3))[1]
        assert contents(play_actions(made, [Action("")], seed=3))[1] == question
        assert contents(play_actions(made, [Action("")], seed=4))[1] != question
        answer = sum(int(term.replace(" ", "")) for term in re.findall(r"(?:^|[+-]) *\d+", question.split(":")[1]))
        right = play_actions(made, [Action(f"<answer>{answer}</answer>")], seed=3)[1]
        wrong = play_actions(made, [Action(f"<answer>{answer + 1}</answer>")], seed=3)[1]
    assert isinstance(right, Stepped) and right.turn.reward == 1.0 and right.turn.done
    assert isinstance(wrong, Stepped) and wrong.turn.reward is not None and wrong.turn.reward < 1.0
    with pytest.raises(ValueError, match=r"environment\.options do not fit"), pool(options={"terms": 2}, **settings):
        pass


def test_textarena_alone() -> None:
    """Bisection finds the number; all games at once in one process are those of a process each."""
    settings: dict[str, Any] = {"target": "GuessTheNumber-v0", "kind": "textarena", "python": interpreter("games")}
    ended = []
    for together in (6, 1):
        with pool(episodes_per_process=together, **settings) as made:
            low, high, events = dict.fromkeys(range(6), 1), dict.fromkeys(range(6), 20), {n: [] for n in range(6)}
            for number in range(6):
                made.open(number, {}, number)
            while not all(seen and isinstance(seen[-1], Finished) for seen in events.values()):
                for event in made.poll(60.0):
                    number = event.episode
                    events[number].append(event)
                    if isinstance(event, Finished):
                        continue
                    assert isinstance(event, Opened | Stepped), event
                    if event.turn.done:
                        made.finish(number)
                        continue
                    if isinstance(event, Stepped):
                        guess = (low[number] + high[number]) // 2
                        higher = "higher" in contents([event])[0]
                        low[number], high[number] = (guess + 1, high[number]) if higher else (low[number], guess - 1)
                    made.step(number, Action(f"[{(low[number] + high[number]) // 2}]"))
        assert all(seen[-2].turn.reward == 1.0 for seen in events.values())
        assert "between 1 and 20" in contents(events[0])[0]
        ended.append({number: contents(seen) for number, seen in events.items()})
    assert ended[0] == ended[1]


def test_textarena_against_an_opponent() -> None:
    settings: dict[str, Any] = {"target": "TicTacToe-v0", "kind": "textarena", "python": interpreter("games")}
    options = {"num_players": 2, "opponent": f"{HERE / 'opponents.py'}:LastFree"}
    with pool(options=options, **settings) as made:
        events = play_actions(made, [Action("[0]"), Action("[1]"), Action("[2]")])
        ended = events[-2]
        assert isinstance(ended, Stepped) and ended.turn.done and ended.turn.reward == 1.0
        assert any("[8]" in said or "8" in said for said in contents(events)[1:])
    with (
        pytest.raises(ValueError, match=r"needs environment\.options\.opponent"),
        pool(options={"num_players": 2}, **settings),
    ):
        pass
    with (
        pytest.raises(ValueError, match="is no game of textarena; use TicTacToe"),
        pool(**{**settings, "target": "TicTacToe"}),
    ):
        pass
    with pytest.raises(ValueError, match=r"num_players=1: The number of players has to be 2"), pool(**settings):
        pass


CALLS = [
    Action(
        "", [{"name": "add", "arguments": {"a": 2, "b": 3}, "id": "1"}, {"name": "fail", "arguments": {"why": "so"}}]
    ),
    Action("", [{"name": "add", "arguments": {"a": "x"}}, {"name": "none", "arguments": {}}]),
    Action("5"),
]


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_mcp(transport: str) -> None:
    python = interpreter("games")
    server = str(HERE / "mcp_server.py")
    if transport == "stdio":
        with pool(target=f"{python} {server}", kind="mcp", python=python) as made:
            events = play_actions(made, CALLS)
    else:
        with (
            served(python, server) as port,
            pool(target=f"http://127.0.0.1:{port}/mcp", kind="mcp", python=python) as made,
        ):
            events = play_actions(made, CALLS)
    opened, first, second, last, finished = events
    assert isinstance(opened, Opened) and opened.turn.tools is not None
    assert [tool["function"]["name"] for tool in opened.turn.tools] == ["add", "fail", "leave"]
    add = opened.turn.tools[0]["function"]
    assert (add["name"], add["description"]) == ("add", "Add two numbers.")
    assert set(add["parameters"]["properties"]) == {"a", "b"}
    assert isinstance(first, Stepped) and first.turn.messages[0] == {
        "role": "tool",
        "name": "add",
        "content": "5",
        "tool_call_id": "1",
    }
    assert first.turn.metrics == {"tool_calls": 2.0, "tool_errors": 1.0} and not first.turn.done
    assert isinstance(second, Stepped) and second.turn.metrics["tool_errors"] == 2.0
    assert isinstance(last, Stepped) and last.turn.done and finished == Finished(0, None)


def test_an_mcp_server_that_ends_is_a_failure() -> None:
    python = interpreter("games")
    with pool(target=f"{python} {HERE / 'mcp_server.py'}", kind="mcp", python=python) as made:
        events = play_actions(made, [Action("", [{"name": "leave", "arguments": {}}]), Action("5")])
    assert failure(events).kind == "error" and "Connection closed" in failure(events).detail


def test_openenv() -> None:
    python = interpreter("openenv")
    with served(python, str(HERE / "openenv_servers.py"), "echo") as port:
        url = f"http://127.0.0.1:{port}"
        with pool(target=url, python=python) as made:  # a URL is kind=openenv
            events = play(made, {0: ["hello", "hi"], 1: ["good day", "hi"]})
        assert contents(events[0]) == ["ready 0", "hello", "hi"] and contents(events[1])[0] == "ready 1"
        rewards = [event.turn.reward for event in events[1] if isinstance(event, Stepped)]
        assert rewards == [8.0, 2.0] and events[1][2].turn.done  # type: ignore[union-attr]
        with pool(target=url, python=python, options={"observation": "length"}) as made:
            assert contents(play(made, {0: ["hello", "hi"]})[0])[1:] == ["5", "2"]


def test_openenv_tools() -> None:
    python = interpreter("openenv")
    server = str(HERE / "openenv_servers.py")
    calls = [Action("", [{"name": "add", "arguments": {"a": 2, "b": 3}}]), Action("5")]
    settings: dict[str, Any] = {"python": python, "options": {"tools": True}}
    with served(python, server, "tools") as port, pool(target=f"http://127.0.0.1:{port}", **settings) as made:
        events = play_actions(made, calls)
    assert isinstance(events[0], Opened) and events[0].turn.tools is not None
    assert [tool["function"]["name"] for tool in events[0].turn.tools] == ["add"]
    assert isinstance(events[1], Stepped) and "5" in contents([events[1]])[0]
    assert isinstance(events[2], Stepped) and events[2].turn.done


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target": "aime2", "kind": "skyrl_gym"}, "is no environment of skyrl-gym; use aime"),
        ({"target": "chain_sums", "kind": "reasoning_gym"}, "is no data set of reasoning-gym"),
    ],
)
def test_what_is_unknown(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why), pool(python=interpreter("games"), **settings):
        pass
