"""`EnvironmentEpisodes`: plays episodes in environments: their messages as tokens, sampled turns as actions, budgets and rewards."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligner.data.decoding import decode
from aligner.data.prompts import Prompt
from aligner.data.tokenizer import Message
from aligner.environments.config import EnvironmentConfig
from aligner.environments.conversation import Conversation, ConversationFormat, TemplateError, prompt_messages
from aligner.environments.pool import Action, EnvironmentPool, Failed, Finished, Opened, PoolEvent, Stepped, Turn
from aligner.environments.reasoning import split_reasoning
from aligner.environments.tool_calls import ParsedTurn, ToolParser, call_message, no_tools
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample

COUNTED = ("tool_calls", "tool_errors", "malformed_calls", "cut_messages")
"""Numbers that add up over an episode's turns; of any other the last one counts."""


@dataclass
class _Play:
    """An episode."""

    task: Prompt
    conversation: Conversation
    parse: ToolParser = no_tools
    tools: Sequence[Mapping[str, Any]] = ()
    turns: int = 0
    """Turns sampled so far."""
    rewards: list[float] = field(default_factory=list)
    """Of each turn that the environment has answered."""
    metrics: dict[str, float] = field(default_factory=dict)
    sampled: Sequence[int] = ()
    """Ids of the last turn."""
    assistant: Message = field(default_factory=dict)
    """The last turn as a message."""
    ended: str = ""
    """How it ended, while its final reward is awaited."""

    def took(self, metrics: Mapping[str, float]) -> None:
        """Keep the numbers that came with a turn."""
        for name, value in metrics.items():
            self.metrics[name] = value + (self.metrics.get(name, 0.0) if name in COUNTED else 0.0)


class EnvironmentEpisodes:
    """Episodes in the environments of a pool (an `EpisodeSource`).

    A turn whose tool calls cannot be read is answered with their error, as a tool's message, and costs the environment no
    step; it counts as a turn with a reward of 0.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        pool: EnvironmentPool,
        form: ConversationFormat,
        parser: Callable[[], ToolParser],
        max_tokens: int,
    ) -> None:
        """Args:
        parser: gives what reads tool calls; called once, when an environment first has tools, and raises ValueError where
            the format is unknown.
        max_tokens: most tokens of an episode's context, sampled ones included (environment.max_tokens, or
            rollout.max_model_len).
        """
        self._config, self._pool, self._form, self._parser = config, pool, form, parser
        self._max_tokens = max_tokens
        self._read_calls: ToolParser | None = None
        self._plays: dict[int, _Play] = {}
        self._ready: deque[Ask | Ended] = deque()

    # ---- what the rollout calls

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        """Open an environment for the task; see `EpisodeSource.start`."""
        self._plays[episode] = _Play(task, Conversation(self._form))
        self._pool.open(episode, dict(task.fields), seed)

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        """What has become ready; see `EpisodeSource.poll`."""
        until = time.monotonic() + wait_s
        while True:
            left = max(0.0, until - time.monotonic())
            for event in self._pool.poll(0.0 if self._ready else left):
                self._take(event)
            if self._ready or time.monotonic() >= until:
                ready = list(self._ready)
                self._ready.clear()
                return ready

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        """The environment takes the turn as an action; see `EpisodeSource.answer`."""
        play = self._plays[episode]
        assert turn == play.turns + 1, f"turn {turn} of episode {episode} follows {play.turns}"
        play.turns, play.sampled = turn, tuple(sample.tokens)
        ids = sample.tokens[:-1] if sample.tokens and sample.tokens[-1] in self._form.ends else sample.tokens
        text = decode(self._form.tokenizer, ids, keep_special_tokens=True)
        parsed = play.parse(text, play.tools)
        call_ids = [f"call{turn:03d}{number:02d}" for number in range(len(parsed.calls))]  # Mistral takes 9 characters
        play.assistant = call_message(parsed, text, call_ids)
        if sample.truncated and len(play.conversation.ids) + len(sample.tokens) >= self._max_tokens:
            play.conversation.messages.append(play.assistant)
            self._finish(episode, play, "max_tokens")
        elif parsed.error is not None:
            play.took({"malformed_calls": 1.0})
            play.rewards.append(0.0)
            self._go_on(
                episode,
                play,
                [{"role": "tool", "content": f"Error: {parsed.error}", "tool_call_id": f"call{turn:03d}00"}],
            )
        else:
            self._pool.step(episode, self._action(play, parsed, text, call_ids, ids))

    def pause(self, episode: int) -> None:
        """Others may take its place in its process; see `EpisodeSource.pause`."""
        self._pool.pause(episode)

    def abandon(self, episodes: Collection[int]) -> None:
        """Close these episodes; nothing more comes from them."""
        for episode in episodes:
            if self._plays.pop(episode, None) is not None:
                self._pool.drop(episode)
        gone = set(episodes)
        self._ready = deque(event for event in self._ready if event.episode not in gone)

    def metrics(self) -> dict[str, float]:
        """Those of the pool, as `episodes/environment_NAME`, and `episodes/tools_left_out`: how many episodes have tools that the
        chat template has not written."""
        figures = {f"episodes/environment_{name}": value for name, value in self._pool.metrics().items()}
        left_out, self._form.tools_left_out = self._form.tools_left_out, 0
        return figures | ({"episodes/tools_left_out": float(left_out)} if left_out else {})

    def close(self) -> None:
        """End the environment processes."""
        self.abandon(list(self._plays))
        self._pool.close()

    # ---- what the environments say

    def _take(self, event: PoolEvent) -> None:
        play = self._plays.get(event.episode)
        if play is None:  # it was abandoned or has failed since
            return
        match event:
            case Failed():
                self._fail(event.episode, play, event.kind, event.detail)
            case Finished():
                play.took(event.metrics)
                self._end(event.episode, play, sum(play.rewards) + (event.reward or 0.0), play.ended, "")
            case Opened():
                self._opened(event.episode, play, event.turn)
            case Stepped():
                self._stepped(event.episode, play, event.turn)

    def _opened(self, episode: int, play: _Play, turn: Turn) -> None:
        play.took(turn.metrics)
        if turn.tools:
            play.tools, play.parse = turn.tools, self._tool_parser()
            play.took({"malformed_calls": 0.0})
        given = [] if turn.replaces else prompt_messages(play.task.fields)
        try:
            play.conversation.open(joined(given, turn.messages), turn.tools, play.task.fields)
        except ValueError as error:
            self._pool.drop(episode)
            self._fail(episode, play, "template", str(error))
            return
        if turn.done:
            self._finish(episode, play, "done")
        else:
            self._ask(episode, play, True)

    def _tool_parser(self) -> ToolParser:
        """Raises ValueError for a template that takes no tool calls, or writes them in an unknown format."""
        if self._read_calls is None:
            self._form.check_tools()
            self._read_calls = self._parser()
        return self._read_calls

    def _stepped(self, episode: int, play: _Play, turn: Turn) -> None:
        play.took(turn.metrics)
        play.rewards.append(turn.reward or 0.0)
        if turn.done:
            play.conversation.messages += [play.assistant, *map(dict, turn.messages)]
            self._finish(episode, play, "done")
        else:
            self._go_on(episode, play, [dict(message) for message in turn.messages])

    def _go_on(self, episode: int, play: _Play, new: list[Message]) -> None:
        """Ask for the next turn, unless a budget is used up."""
        if play.turns >= self._config.max_turns:
            play.conversation.messages += [play.assistant, *new]
            self._finish(episode, play, "max_turns")
            return
        try:
            extension = _extended(play, new)
        except TemplateError as error:
            self._pool.drop(episode)
            self._fail(episode, play, "template", str(error))
            return
        self._ask(episode, play, extension)

    def _ask(self, episode: int, play: _Play, new_segment: bool) -> None:
        context = play.conversation.ids
        room = self._max_tokens - len(context)
        if room < 1:
            self._finish(episode, play, "max_tokens")
            return
        self._ready.append(Ask(episode, play.turns + 1, tuple(context), new_segment, room))

    def _action(
        self, play: _Play, parsed: ParsedTurn, text: str, call_ids: Sequence[str], ids: Sequence[int]
    ) -> Action:
        """What the environment is given.

        Args:
            ids: of the text.
        """
        read = bool(parsed.calls) or parsed.reasoning is not None
        shown = parsed.content if read else text
        if self._config.hide_reasoning:  # the content that was read is what follows the reasoning
            shown = split_reasoning(shown, play.conversation.opens_reasoning and not read)[1].strip()
        for special in {self._form.special[token] for token in ids if token in self._form.special}:
            shown = shown.replace(special, "")
        calls = [
            {"name": call.name, "arguments": call.arguments, "id": name}
            for call, name in zip(parsed.calls, call_ids, strict=True)
        ]
        return Action(shown, calls)

    # ---- how episodes end

    def _finish(self, episode: int, play: _Play, ended: str) -> None:
        play.ended = ended
        self._pool.finish(episode)

    def _fail(self, episode: int, play: _Play, kind: str, detail: str) -> None:
        self._end(episode, play, math.nan, kind, detail)

    def _end(self, episode: int, play: _Play, reward: float, ended: str, detail: str) -> None:
        del self._plays[episode]
        rewards = (*play.rewards, *[0.0] * (play.turns - len(play.rewards)))  # no answer to the last turn
        record = {"detail": detail, "metrics": play.metrics, "messages": play.conversation.messages}
        self._ready = deque(event for event in self._ready if event.episode != episode)  # it asks for nothing any more
        self._ready.append(Ended(episode, reward, rewards, ended, record))


def _extended(play: _Play, new: list[Message]) -> bool:
    """Extend the conversation; whether a new segment begins."""
    try:
        return play.conversation.extend(play.sampled, play.assistant, new).new_segment
    except TemplateError:
        if play.assistant.get("tool_calls") or not any(message["role"] == "tool" for message in new):
            raise
    # The template takes a tool's message only after a call: the error of a call that was none is the user's.
    new[:] = [{"role": "user", "content": message["content"]} for message in new]
    return play.conversation.extend(play.sampled, play.assistant, new).new_segment


def joined(given: Sequence[Message], more: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A task's messages with those of the reset behind them; a user's follows the user's in the same message, as templates
    that want roles in turn need it (and TRL does)."""
    messages, rest = [dict(message) for message in given], [dict(message) for message in more]
    if messages and rest and messages[-1]["role"] == rest[0]["role"] == "user":
        texts = (messages[-1]["content"], rest[0]["content"])
        if all(isinstance(text, str) for text in texts):
            messages[-1]["content"] = "\n\n".join(texts)
            del rest[0]
    return [*messages, *rest]
