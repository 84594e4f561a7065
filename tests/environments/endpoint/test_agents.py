"""Programs play episodes through the endpoint; the policy is scripted, everything else is real."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trl

from aligner.config.schema import compose_config, to_config
from aligner.data.decoding import decode
from aligner.data.prompts import Prompt
from aligner.environments.agent_config import AgentConfig, resolve_command
from aligner.environments.config import EnvironmentConfig
from aligner.environments.conversation import ConversationFormat
from aligner.environments.endpoint.agents import AgentEpisodes
from aligner.environments.endpoint.errors import ApiError
from aligner.environments.endpoint.exchange import Pending
from aligner.environments.endpoint.requests import chat_request
from aligner.environments.tool_calls import hermes
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample
from tests.data.byte_level import make_tokenizer
from tests.environments.endpoint.verifiers_package import verifiers_program, write_words

PROGRAM = Path(__file__).with_name("chat_program.py")
QWEN = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
TASK = Prompt((1, 2), "2 + 2?", {"question": "2 + 2?", "answer": 4}, 0)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
Policy = Callable[[Ask, str], str]


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> ConversationFormat:
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(folder, special, QWEN.read_text(), eos="<|endoftext|>")
    return ConversationFormat(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])


@dataclass
class Played:
    """All that came of some episodes."""

    asks: dict[int, list[Ask]] = field(default_factory=dict)
    sampled: dict[int, list[list[int]]] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    together: int = 0
    """Most turns that were open at once."""
    metrics: dict[str, float] = field(default_factory=dict)


class Player:
    """Plays episodes of a program, with a policy that is a function of the ask and its text."""

    def __init__(self, form: ConversationFormat) -> None:
        self.form = form

    def play(
        self,
        what: str,
        policy: Policy = lambda ask, text: f"turn {ask.turn}",
        episodes: int = 1,
        max_tokens: int = 2000,
        agent: Mapping[str, Any] | None = None,
        task: Prompt = TASK,
        order: random.Random | None = None,
        pause: bool = False,
        **settings: Any,
    ) -> Played:
        """Args:
        order: turns that were asked for wait until nothing more comes for a while, and are answered in the order that this draws.
        pause: the first turns are answered once every episode has asked for its own.
        """
        command = {"command": f"{sys.executable} -S {PROGRAM} {what}"}
        config = EnvironmentConfig(agent=AgentConfig(**{**command, **(agent or {})}), **settings)
        source = AgentEpisodes(config, self.form, lambda: hermes, max_tokens, 259)
        played = Played()
        try:
            for episode in range(episodes):
                source.start(episode, task, seed=100 + episode)
            deadline = time.monotonic() + 120
            waiting: list[Ask] = []
            while len(played.ended) < episodes:
                assert time.monotonic() < deadline, played
                events = source.poll(0.2)
                played.ended.update({event.episode: event for event in events if isinstance(event, Ended)})
                waiting += [event for event in events if isinstance(event, Ask)]
                played.together = max(played.together, len(waiting))
                if pause:
                    for event in waiting:
                        source.pause(event.episode)
                    pause = len(waiting) < episodes
                if order is not None:
                    order.shuffle(waiting)
                while waiting and not pause and not (order and events):
                    self._answer(source, waiting.pop(0), policy, played)
                    if order is not None:
                        break
            played.metrics = source.metrics()
        finally:
            source.close()
        return played

    def _answer(self, source: AgentEpisodes, ask: Ask, policy: Policy, played: Played) -> None:
        tokenizer = self.form.tokenizer
        text = policy(ask, decode(tokenizer, ask.context, keep_special_tokens=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        played.asks.setdefault(ask.episode, []).append(ask)
        played.sampled.setdefault(ask.episode, []).append(ids)  # in the order of the answers
        source.answer(ask.episode, ask.turn, Sample([], 0, ids, [-0.5] * len(ids), [1] * len(ids), True))


@pytest.fixture
def player(form: ConversationFormat) -> Player:
    return Player(form)


def texts(player: Player, played: Played, episode: int = 0) -> list[str]:
    return [decode(player.form.tokenizer, ask.context, keep_special_tokens=True) for ask in played.asks[episode]]


@pytest.mark.parametrize("pause", [False, True], ids=["", "paused"])
def test_a_conversation_keeps_the_ids_that_were_sampled(player: Player, pause: bool) -> None:
    """Three programs, of which two run at once, beside those that wait for a later step."""
    played = player.play("talk", episodes=3, agent={"processes": 2}, pause=pause)
    for episode in range(3):
        end, asks = played.ended[episode], played.asks[episode]
        assert (end.ended, end.reward, end.turn_rewards) == ("done", 2.5, (0.5, 1.0, 1.0)), end.record
        assert end.record["metrics"] == {"words": 4.0} and [ask.turn for ask in asks] == [1, 2, 3]
        assert [ask.new_segment for ask in asks] == [True, False, False]
        known: tuple[int, ...] = ()
        for ask, ids in zip(asks, played.sampled[episode], strict=True):
            assert ask.context[: len(known)] == known
            known = (*ask.context, *ids)
        assert end.record["messages"][1] == {"role": "assistant", "content": "turn 1"}
    last = texts(player, played)[-1]
    assert last.endswith("<|im_start|>assistant\n") and "2 + 2?<|im_end|>" in last and last.count("turn ") == 2
    assert len({ask.seed_key for ask in played.asks[0]}) == 3
    assert [ask.seed_key for ask in played.asks[0]] == [
        ask.seed_key for ask in played.asks[1]
    ]  # made of the content alone
    assert played.metrics == {"episodes/requests": 9.0}


def test_tool_calls_come_back_however_they_are_written(player: Player) -> None:
    played = player.play("tool", lambda ask, text: CALL if ask.turn == 1 else "3")
    assert played.ended[0].reward == 1.0 and [ask.new_segment for ask in played.asks[0]] == [True, False]
    first, second = texts(player, played)
    assert '"add"' in first and second.startswith(first + CALL + "<|im_end|>") and "<tool_response>\n3" in second


def test_a_program_that_wants_one_call_gets_the_first(player: Player) -> None:
    """What it did not see is not in its next request, which therefore begins a segment."""
    played = player.play("one_call", lambda ask, text: f"{CALL}\n{CALL}" if ask.turn == 1 else "3")
    assert played.ended[0].reward == 1.0 and [ask.new_segment for ask in played.asks[0]] == [True, True]
    assert texts(player, played)[1].count(CALL) == 1


def test_a_history_that_was_changed_begins_a_segment(player: Player) -> None:
    played = player.play("rewrite")
    assert [ask.new_segment for ask in played.asks[0]] == [True, True]
    assert "something else" in texts(player, played)[1]


def test_requests_at_once_are_segments_whose_seeds_do_not_depend_on_their_order(player: Player) -> None:
    runs = [player.play("branches") for _ in range(2)]
    keys = []
    for played in runs:
        asks = played.asks[0]
        assert len(asks) == 4 and [ask.new_segment for ask in asks][2:] == [True, True]
        keys.append({text[-40:]: ask.seed_key for text, ask in zip(texts(player, played), asks, strict=True)})
        ids = (*asks[0].context, *played.sampled[0][0])
        assert all(ask.context[: len(ids)] == ids for ask in asks[1:])  # what was sampled, exactly, in each branch
    assert keys[0] == keys[1]


def test_requests_at_once_are_open_together_and_the_row_does_not_depend_on_their_order(player: Player) -> None:
    """Three sub-agents of two turns each, then a summary of what they said; two of them say the same but for their seed."""
    rows = []
    for run in range(3):
        played = player.play("sub_agents", lambda ask, text: f"<{ask.seed_key}>", order=random.Random(run))
        end, asks = played.ended[0], {ask.turn: ask for ask in played.asks[0]}
        assert (end.ended, end.reward, len(asks)) == ("done", 1.0, 8) and played.together >= 3, end
        order = end.order or tuple(sorted(asks))
        rows.append(([texts(player, played)[played.asks[0].index(asks[number])] for number in order], end.turn_rewards))
        row = [asks[number].context for number in order]
        sampled = dict(zip((ask.turn for ask in played.asks[0]), played.sampled[0], strict=True))
        for place in (1, 3, 5):  # each sub-agent's second turn follows its first
            ids = (*row[place], *sampled[order[place]])
            assert row[place + 1][: len(ids)] == ids
        assert order[0] == 1 and order[-1] == 8 and "Sum up" in rows[-1][0][-1]
        assert end.record["messages"][0]["content"] == "Sum up."
    assert rows[0] == rows[1] == rows[2]


def test_token_ids_in_and_out(player: Player) -> None:
    played = player.play("generate")
    first, second = played.asks[0]
    assert first.context == (1, 2, 3) and first.max_tokens == 5
    assert second.context == (1, 2, 3, *played.sampled[0][0], 7) and not second.new_segment
    assert played.ended[0].record["messages"][0]["role"] == "text"


def test_a_request_that_is_sent_again_gets_the_same_answer(player: Player) -> None:
    played = player.play("again")
    assert played.ended[0].reward == 1.0 and len(played.asks[0]) == 1


def test_a_request_whose_client_has_gone_is_over(form: ConversationFormat) -> None:
    """Its thread must not wait for ever, and the program's time goes on."""
    config = EnvironmentConfig(agent=AgentConfig(command=f"{sys.executable} -S {PROGRAM} never"))
    source = AgentEpisodes(config, form, lambda: hermes, 2000, 259)
    try:
        source.start(0, TASK, 0)
        request = chat_request({"messages": [{"role": "user", "content": "Hi."}]}, 259)
        pending = Pending(source._episodes[0].session, request, connected=lambda: False)
        source._exchange.put(pending)
        assert source.poll(60.0) == []
        with pytest.raises(ApiError) as caught:
            pending.wait()
        assert caught.value.code == "client_closed"
    finally:
        source.close()


def test_a_first_request_that_is_refused_is_told(player: Player) -> None:
    end = player.play("print", max_tokens=4).ended[0]
    assert (end.ended, end.record["detail"]) == (
        "protocol",
        "the program ended without a turn; what it asked for was refused (max_tokens)",
    )


def test_the_last_line_of_standard_output_is_a_reward(player: Player) -> None:
    end = player.play("print").ended[0]
    assert (end.ended, end.reward, end.turn_rewards) == ("done", 0.25, (0.0,))


def test_budgets(player: Player) -> None:
    played = player.play("greedy", max_turns=4)
    end = played.ended[0]
    assert (end.ended, end.reward, len(played.asks[0])) == ("max_turns", 1.0, 4)
    assert "environment.max_turns=4" in end.record["stderr"]
    played = player.play("long", max_tokens=300)
    assert (played.ended[0].ended, played.ended[0].reward, len(played.asks[0])) == ("done", 1.0, 1)
    assert played.asks[0][0].max_tokens == 300 - len(played.asks[0][0].context)


def test_a_stop_text_cuts_the_answer_and_the_next_request_begins_a_segment(player: Player) -> None:
    played = player.play("stop", lambda ask, text: "abc")
    assert played.ended[0].reward == 1.0 and played.asks[0][1].new_segment
    assert "assistant\na<|im_end|>" in texts(player, played)[1]


def test_text_that_cannot_be_encoded_is_refused(player: Player) -> None:
    assert player.play("surrogate").ended[0].reward == 1.0


@pytest.mark.parametrize(
    ("what", "kind", "detail", "settings"),
    [
        ("crash", "crashed", "the tool broke", {}),
        ("nothing", "protocol", "without a turn", {}),
        ("silent", "no_reward", "environment.agent.reports_reward", {}),
        ("print_text", "no_reward", 'reward must be a number from -1e+30 to 1e+30; it is "high"', {}),
        ("hang", "timeout", "environment.step_timeout_s", {"step_timeout_s": 0.5}),
        ("hang", "episode_timeout", "environment.episode_timeout_s", {"episode_timeout_s": 2.0}),
        ("never", "timeout", "environment.start_timeout_s", {"start_timeout_s": 0.5}),
        ("memory", "memory", "", {"memory_mib": 300}),
        ("orphans_memory", "memory", "its processes used", {"memory_mib": 200, "step_timeout_s": 100.0}),
        ("liar", "protocol", "turn_rewards", {}),
    ],
)
def test_failures_are_told_apart_and_never_a_zero(
    player: Player, what: str, kind: str, detail: str, settings: dict[str, Any]
) -> None:
    end = player.play(what, **settings).ended[0]
    assert end.ended == kind and math.isnan(end.reward) and detail in end.record["detail"], end


def test_rules_may_score_the_text_instead(player: Player) -> None:
    end = player.play("silent", agent={"reports_reward": False}).ended[0]
    assert (end.ended, end.reward) == ("done", 0.0)


def test_nothing_that_a_program_started_outlives_it(
    player: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    assert player.play("orphan", agent={"pass_env": ("PID_FILE",)}).ended[0].reward == 1.0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_programs_get_no_more_of_the_jobs_environment_than_they_need(
    player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-for-programs")
    monkeypatch.setenv("RANK", "0")
    kept = json.loads(player.play("environment").ended[0].record["stdout"].splitlines()[-2])
    assert not kept.keys() & {"WANDB_API_KEY", "RANK", "PYTHONPATH"}
    assert json.loads(kept["file"]) == TASK.fields and kept["ALIGNER_SEED"] == "100"


@pytest.mark.environments
def test_the_openai_sdk_streams_and_calls_tools(player: Player) -> None:
    """An agent as its authors wrote it; the policy's words are given, so that it calls a tool."""
    program = PROGRAM.with_name("sdk_program.py")
    answers = [CALL, "<think>\nSo 3.\n</think>\n\n3", "Bye."]
    played = player.play("", lambda ask, text: answers[ask.turn - 1], agent={"command": f"{sys.executable} {program}"})
    end = played.ended[0]
    assert (end.ended, end.reward) == ("done", 1.0), end
    known = played.asks[0][0].context
    for ask, ids in zip(played.asks[0][1:], played.sampled[0], strict=False):
        assert ask.context[: len(known) + len(ids)] == (*known, *ids)
        known = ask.context


@pytest.mark.environments
def test_a_verifiers_environment_renders_by_itself(
    player: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TextArena's Hangman as verifiers ships it, with its harness and renderer: token ids both ways, one segment."""
    monkeypatch.setenv("NLTK_DATA", str(write_words(tmp_path)))
    command = " ".join(verifiers_program(tmp_path))
    settings = {"max_turns": 30, "start_timeout_s": 300.0, "step_timeout_s": 100.0}
    agent = {"command": command, "pass_env": ("NLTK_DATA",)}
    letters = "abcdefghijklmnopqrstuvwxyz"
    policy = lambda ask, text: f"[{letters[ask.turn]}]"  # noqa: E731
    task = replace(TASK, fields={"task": 1})
    played = player.play("", policy, max_tokens=4096, agent=agent, task=task, **settings)
    end = played.ended[0]
    assert end.ended == "done" and end.record["metrics"] == {"verifiers_turns": float(len(end.turn_rewards))}, end
    assert len(end.turn_rewards) > 3 and [ask.new_segment for ask in played.asks[0]] == [True] + [False] * (
        len(end.turn_rewards) - 1
    )


def test_an_abandoned_episode_says_nothing_more(form: ConversationFormat) -> None:
    config = EnvironmentConfig(agent=AgentConfig(command=f"{sys.executable} -S {PROGRAM} talk", processes=1))
    source = AgentEpisodes(config, form, lambda: hermes, 2000, 259)
    try:
        source.start(0, TASK, 0)
        source.start(1, TASK, 0)
        first = _first_ask(source)
        assert first.episode == 0
        source.abandon([0])
        assert _first_ask(source).episode == 1
        source.abandon([1])
        assert source.poll(0.1) == []
    finally:
        source.close()


def _first_ask(source: AgentEpisodes) -> Ask:
    return next(event for event in _events(source) if isinstance(event, Ask))


def _events(source: AgentEpisodes) -> Iterator[Ask | Ended]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        yield from source.poll(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": "no-such-program x"}, "no-such-program"),
        ({"command": "python 'x"}, "words"),
        ({"command": "python x", "pass_env": ("NOT_SET_ANYWHERE",)}, "NOT_SET_ANYWHERE"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentConfig(**settings).check()


def test_settings_by_name() -> None:
    config = to_config(
        compose_config(["environment=agent", "model.path=x", "data.path=y", "environment.agent.processes=3"])
    )
    environment = config.environment
    assert environment.enabled and not environment.target and environment.max_turns == 3
    assert environment.agent == AgentConfig("python docs/examples/agent.py", processes=3)
    assert [Path(word).name for word in resolve_command(f"python {PROGRAM} talk")[1:]] == ["chat_program.py", "talk"]


def test_a_program_and_an_environment_are_one_too_many() -> None:
    with pytest.raises(ValueError, match=r"environment\.target=x"):
        EnvironmentConfig(target="x", agent=AgentConfig(command="python x")).check()
