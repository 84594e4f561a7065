"""Episodes in scripted environments: what is asked, what the environment is given, budgets, rewards, failures."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from aligner.data.prompts import Prompt
from aligner.environments.config import EnvironmentConfig
from aligner.environments.conversation import ConversationFormat
from aligner.environments.episodes import EnvironmentEpisodes, joined
from aligner.environments.parsers import named_parser
from aligner.environments.pool import Action, EnvironmentPool, Failed, Finished, Opened, PoolEvent, Stepped, Turn
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample
from tests.data.chat_templates import TEMPLATES
from tests.environments.families import FAMILIES, stop_ids, tokenizer_of

ADD = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
TOOLS = ({"type": "function", "function": ADD},)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
Environment = Callable[[Action], Turn | Failed]


class Scripted(EnvironmentPool):
    """A pool of environments in this process, whose answers come in the order in which they were asked for."""

    def __init__(self, opening: Turn | Failed, environment: Environment, final: float | None = None) -> None:
        self.opening, self.environment, self.final = opening, environment, final
        self.events: deque[PoolEvent] = deque()
        self.opened: list[tuple[int, dict[str, Any], int]] = []
        self.actions: list[Action] = []
        self.dropped: list[int] = []
        self.closed = False

    def open(self, episode: int, row: dict[str, Any], seed: int) -> None:
        self.opened.append((episode, row, seed))
        self.events.append(self._event(episode, self.opening, Opened))

    def step(self, episode: int, action: Action) -> None:
        self.actions.append(action)
        self.events.append(self._event(episode, self.environment(action), Stepped))

    def _event(self, episode: int, answer: Turn | Failed, kind: type[Opened | Stepped]) -> PoolEvent:
        return kind(episode, answer) if isinstance(answer, Turn) else answer

    def finish(self, episode: int) -> None:
        self.events.append(Finished(episode, self.final, {"score": 7.0}))

    def poll(self, wait_s: float) -> list[PoolEvent]:
        events = list(self.events)
        self.events.clear()
        return events

    def metrics(self) -> dict[str, float]:
        return {"calls": 3.0}

    def drop(self, episode: int) -> None:
        self.dropped.append(episode)

    def close(self) -> None:
        self.closed = True


FAMILY = FAMILIES["qwen2.5"]
TOKENIZER = tokenizer_of(FAMILY)


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def source_of(pool: Scripted, family: str = "qwen2.5", max_tokens: int = 4000, **settings: Any) -> EnvironmentEpisodes:
    tokenizer = TOKENIZER if family == "qwen2.5" else tokenizer_of(FAMILIES[family])
    form = ConversationFormat(tokenizer, stop_ids(tokenizer, FAMILIES[family]))
    config = EnvironmentConfig("scripted", **settings)
    return EnvironmentEpisodes(config, pool, form, lambda: named_parser(config.tool_parser, tokenizer), max_tokens)


def play(
    source: EnvironmentEpisodes, *turns: str, row: dict[str, Any] | None = None, truncated: bool = False
) -> tuple[list[Ask], Ended]:
    """One episode of these turns: what was asked, and how it ended."""
    source.start(5, Prompt((1,), "", {"prompt": "Hello?"} if row is None else row, 0), 11)
    asked: list[Ask] = []
    while True:
        events = source.poll(0.0)
        if not events:
            continue
        (event,) = events
        if isinstance(event, Ended):
            return asked, event
        asked.append(event)
        tokens = ids(turns[len(asked) - 1])
        source.answer(5, event.turn, Sample([], 0, tokens, ended=True, truncated=truncated))


def answers(*turns: Turn | Failed) -> Environment:
    queue = deque(turns)
    return lambda action: queue.popleft()


def said(text: str, role: str = "user", **more: Any) -> Turn:
    return Turn([{"role": role, "content": text}], **more)


def test_an_episode_of_three_turns() -> None:
    pool = Scripted(
        said("Begin."), answers(said("Colder.", reward=0.5), said("Warmer."), Turn([], True, 2.0)), final=10.0
    )
    source = source_of(pool)
    asked, end = play(
        source, "One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>", row={"prompt": "Hello?", "answer": 3}
    )
    assert pool.opened == [(5, {"prompt": "Hello?", "answer": 3}, 11)]
    assert [action.text for action in pool.actions] == ["One.", "Two.", "Three."]
    assert (end.reward, end.turn_rewards, end.ended) == (12.5, (0.5, 0.0, 2.0), "done")
    messages = [
        {"role": "user", "content": "Hello?\n\nBegin."}, {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Colder."}, {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Warmer."}, {"role": "assistant", "content": "Three."},
    ]  # fmt: skip
    assert end.record == {"detail": "", "metrics": {"score": 7.0}, "messages": messages}
    whole = TOKENIZER.apply_chat_template(messages[:5], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert [ask.turn for ask in asked] == [1, 2, 3]
    assert [ask.new_segment for ask in asked] == [True, False, False]
    assert asked[-1].context == tuple(whole)
    assert [ask.max_tokens for ask in asked] == [4000 - len(ask.context) for ask in asked]


def test_tool_calls_are_parsed_and_their_results_follow() -> None:
    pool = Scripted(
        Turn([], tools=TOOLS),
        answers(
            said("3", "tool", metrics={"tool_calls": 1.0, "depth": 4.0}),
            Turn([], True, 1.0, metrics={"tool_calls": 0.0, "depth": 1.0}),
        ),
    )
    asked, end = play(source_of(pool), f"Let me add.\n{CALL}", "It is 3.<|im_end|>")
    assert pool.actions == [
        Action("Let me add.", [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "call00100"}]),
        Action("It is 3.", []),
    ]
    text = str(TOKENIZER.decode(asked[1].context))
    assert text.endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert '"name": "add", "parameters"' in text
    assert end.record["metrics"] == {"malformed_calls": 0.0, "tool_calls": 1.0, "depth": 1.0, "score": 7.0}


def test_malformed_calls_are_answered_without_the_environment() -> None:
    pool = Scripted(Turn([], tools=TOOLS), answers(Turn([], True, 1.0)))
    asked, end = play(source_of(pool), "<tool_call>{bad}</tool_call><|im_end|>", "It is 3.<|im_end|>")
    assert [action.text for action in pool.actions] == ["It is 3."]
    assert "<tool_response>\nError: tool call 1 is not valid JSON" in str(TOKENIZER.decode(asked[1].context))
    assert (end.turn_rewards, end.record["metrics"]["malformed_calls"]) == ((0.0, 1.0), 1.0)


def test_the_error_of_a_call_is_a_users_message_where_the_template_wants_a_call_before_a_tool() -> None:
    tokenizer = tokenizer_of(FAMILIES["gpt-oss"])
    pool = Scripted(
        Turn([], tools=({"type": "function", "function": {**ADD, "description": "Add."}},)), answers(Turn([], True))
    )
    source = source_of(pool, "gpt-oss")
    source.start(5, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
    (ask,) = source.poll(0.0)
    tokens = tokenizer.encode("<|channel|>commentary to=functions.add<|message|>{bad<|call|>", add_special_tokens=False)
    source.answer(5, 1, Sample([], 0, tokens, ended=True))
    (ask,) = source.poll(0.0)
    assert isinstance(ask, Ask)
    assert str(tokenizer.decode(ask.context)).endswith(
        "Error: tool call 1 is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)<|end|><|start|>assistant"
    )


def test_budget_of_turns() -> None:
    pool = Scripted(said("Begin."), answers(said("On.", reward=1.0), said("On.", reward=2.0)), final=0.5)
    asked, end = play(source_of(pool, max_turns=2), "One.<|im_end|>", "Two.<|im_end|>")
    assert (len(asked), end.ended, end.reward, end.turn_rewards) == (2, "max_turns", 3.5, (1.0, 2.0))


def test_budget_of_tokens() -> None:
    pool = Scripted(said("Begin."), answers(said("On. " * 50, reward=1.0)))
    first = len(
        TOKENIZER.apply_chat_template(
            [{"role": "user", "content": "Hello?\n\nBegin."}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    )
    asked, end = play(source_of(pool, max_tokens=first + 40), "One.<|im_end|>")
    assert (asked[0].max_tokens, len(asked), end.ended, end.reward) == (40, 1, "max_tokens", 1.0)
    # a turn that was cut off by it is no action
    pool = Scripted(said("Begin."), answers())
    asked, end = play(source_of(pool, max_tokens=first + len(ids("One and"))), "One and", truncated=True)
    assert (pool.actions, end.ended, end.turn_rewards) == ([], "max_tokens", (0.0,))
    # one that reached sampling.max_tokens is one, and is closed as the template does
    pool = Scripted(said("Begin."), answers(said("On."), Turn([], True)))
    asked, end = play(source_of(pool), "One and", "Two.<|im_end|>", truncated=True)
    assert [action.text for action in pool.actions] == ["One and", "Two."]
    assert "One and<|im_end|>\n<|im_start|>user" in str(TOKENIZER.decode(asked[1].context))
    # no room for a first turn
    pool = Scripted(said("Begin."), answers())
    asked, end = play(source_of(pool, max_tokens=first))
    assert (asked, end.ended, end.turn_rewards) == ([], "max_tokens", ())


@pytest.mark.parametrize("kind", ["timeout", "crashed", "memory", "protocol"])
def test_failures_have_no_reward(kind: str) -> None:
    pool = Scripted(said("Begin."), answers(said("On.", reward=1.0), Failed(5, kind, "what happened")))
    _, end = play(source_of(pool), "One.<|im_end|>", "Two.<|im_end|>")
    assert math.isnan(end.reward)
    assert (end.ended, end.turn_rewards, end.record["detail"]) == (kind, (1.0, 0.0), "what happened")


def test_a_failed_opening() -> None:
    asked, end = play(source_of(Scripted(Failed(5, "crashed", "exit 1"), answers())))
    assert (asked, end.ended, end.turn_rewards) == ([], "crashed", ())


def test_messages_that_the_template_refuses_fail_the_episode() -> None:
    pool = Scripted(said("Begin."), answers(Turn([{"role": "narrator", "content": "On."}])))
    _, end = play(source_of(pool), "One.<|im_end|>")
    assert math.isnan(end.reward)
    assert end.ended == "template"
    assert "role 'narrator'" in end.record["detail"]
    assert pool.dropped == [5]
    pool = Scripted(Turn([]), answers())
    _, end = play(source_of(pool), row={"answer": 3})
    assert (end.ended, pool.dropped) == ("template", [5])


def test_an_episode_that_is_over_at_once() -> None:
    asked, end = play(source_of(Scripted(Turn([], done=True), answers(), final=1.0)))
    assert (asked, end.ended, end.reward, end.turn_rewards) == ([], "done", 1.0, ())


def test_an_opening_in_place_of_the_rows_messages() -> None:
    asked, _ = play(source_of(Scripted(said("Begin.", replaces=True), answers(Turn([], True)))), "One.<|im_end|>")
    assert "Hello?" not in str(TOKENIZER.decode(asked[0].context))


def test_reasoning_can_be_hidden_from_the_environment() -> None:
    text = "<think>\n[1]\n</think>\n\nMove [2]<|im_end|>"
    for hide, expected in ((True, "Move [2]"), (False, "<think>\n[1]\n</think>\n\nMove [2]")):
        pool = Scripted(said("Begin."), answers(Turn([], True)))
        play(source_of(pool, hide_reasoning=hide), text)
        assert [action.text for action in pool.actions] == [expected]


@pytest.mark.parametrize(("family", "opening"), [("qwen2.5", "<think>\n"), ("qwen3.5-think", "")])
def test_reasoning_that_was_cut_off_is_hidden(family: str, opening: str) -> None:
    """Opened by the turn, or by the template's generation prompt."""
    tokenizer = tokenizer_of(FAMILIES[family])
    for text, expected in ((f"{opening}I could move", ""), ("Move [2]", "" if not opening else "Move [2]")):
        pool = Scripted(said("Begin."), answers(Turn([], True)))
        source = source_of(pool, family, hide_reasoning=True)
        source.start(5, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
        source.poll(0.0)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        source.answer(5, 1, Sample([], 0, tokens, ended=True, truncated=True))
        assert [action.text for action in pool.actions] == [expected]


def test_the_words_before_a_call_are_no_reasoning() -> None:
    """Also where the template's generation prompt has opened the reasoning, which the turn closes."""
    call = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    tokens = tokenizer_of(FAMILIES["qwen3.5-think"]).encode(
        f"Two.\n</think>\n\nI add.\n\n{call}", add_special_tokens=False
    )
    for hide in (False, True):
        pool = Scripted(said("Begin.", tools=TOOLS), answers(Turn([], True)))
        source = source_of(pool, "qwen3.5-think", hide_reasoning=hide)
        source.start(5, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
        source.poll(0.0)
        source.answer(5, 1, Sample([], 0, tokens, ended=True))
        assert [(action.text, len(action.tool_calls)) for action in pool.actions] == [("I add.", 1)]


def test_an_episode_that_has_failed_asks_for_nothing() -> None:
    """A call that cannot be read is answered at once; its environment fails before that is polled."""
    pool = Scripted(Turn([], tools=TOOLS), answers())
    source = source_of(pool)
    source.start(5, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
    source.poll(0.0)
    source.answer(5, 1, Sample([], 0, ids("<tool_call>\n{</tool_call><|im_end|>"), ended=True))
    pool.events.append(Failed(5, "crashed", "exit 1"))
    (event,) = source.poll(0.0)
    assert isinstance(event, Ended) and (event.ended, event.turn_rewards) == ("crashed", (0.0,))


def test_the_environment_sees_no_special_tokens() -> None:
    pool = Scripted(said("Begin."), answers(Turn([], True)))
    play(source_of(pool), "Move <|im_start|>[2]<|endoftext|><|im_end|>")
    assert [action.text for action in pool.actions] == ["Move [2]"]


def test_abandoned_episodes_say_nothing_more() -> None:
    pool = Scripted(said("Begin."), answers())
    source = source_of(pool)
    for episode in (1, 2):
        source.start(episode, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
    source.abandon([1])
    assert [event.episode for event in source.poll(0.0)] == [2]
    source.start(3, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
    source.close()
    assert source.poll(0.0) == []
    assert (pool.dropped, pool.closed) == ([1, 2, 3], True)


def test_tools_that_the_template_leaves_out_are_counted() -> None:
    tokenizer = tokenizer_of(FAMILY)
    tokenizer.chat_template = TEMPLATES["tools"].plain.split("{% endif %}", 1)[1]
    form = ConversationFormat(tokenizer, stop_ids(tokenizer, FAMILY))
    pool = Scripted(Turn([], tools=TOOLS), answers(Turn([], True)))
    source = EnvironmentEpisodes(
        EnvironmentConfig("scripted"), pool, form, lambda: named_parser("hermes", tokenizer), 4000
    )
    play(source, "It is 3.<|im_end|>")
    assert source.metrics() == {"episodes/environment_calls": 3.0, "episodes/tools_left_out": 1.0}
    assert source.metrics() == {"episodes/environment_calls": 3.0}


def test_tools_need_a_template_that_takes_them() -> None:
    source = source_of(Scripted(Turn([], tools=TOOLS), answers()), "phi3")
    source.start(5, Prompt((1,), "", {"prompt": "Hello?"}, 0), 0)
    with pytest.raises(ValueError, match=r"environment\.target: the environment has tools"):
        source.poll(0.0)


def test_joined() -> None:
    task, more = (
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": "b"}, {"role": "user", "content": "c"}],
    )
    assert joined(task, more) == [{"role": "user", "content": "a\n\nb"}, {"role": "user", "content": "c"}]
    assert joined([], more) == more
    assert joined([{"role": "system", "content": "s"}], more[:1]) == [{"role": "system", "content": "s"}, more[0]]
    assert (task, more[0]) == ([{"role": "user", "content": "a"}], {"role": "user", "content": "b"})
