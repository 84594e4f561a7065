"""`AgentEpisodes`: episodes that programs play, with the policy as their model behind the endpoint (an `EpisodeSource`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligner.data.decoding import decode
from aligner.data.prompts import Prompt
from aligner.data.tokenizer import encode_text
from aligner.environments.agent_config import resolve_command
from aligner.environments.config import EnvironmentConfig
from aligner.environments.conversation import ConversationFormat
from aligner.environments.endpoint.errors import ApiError, bad_request
from aligner.environments.endpoint.exchange import Exchange, Pending, Session
from aligner.environments.endpoint.programs import Exited, Launch, ProgramLimits, Programs
from aligner.environments.endpoint.requests import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    RewardReport,
    reward_report,
)
from aligner.environments.endpoint.responses import Reply
from aligner.environments.endpoint.sampled_turn import read_turn
from aligner.environments.endpoint.server import EndpointServer, ServedModel
from aligner.environments.endpoint.transcript import ChatContext, ChatTurn, Transcript
from aligner.environments.tool_calls import ToolParser, no_tools
from aligner.rollout.episodes.source import Ask, Ended
from aligner.rollout.requests import Sample

MODEL = "policy"
"""The model's name in answers; requests may name any."""
TASK_FILE = "task.json"
PASSED_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
LONGEST_VARIABLE = 100_000
"""Linux takes 128 KiB for one variable; a longer task is in the file alone."""


@dataclass
class _OpenTurn:
    """A turn that is being sampled."""

    ask: Ask
    request: ChatRequest | CompletionRequest | GenerateRequest
    chat: ChatContext | None
    place: tuple[str, int]
    base: int
    waiting: list[Pending]
    """The request, and what its client has sent again."""


@dataclass(frozen=True)
class _PastTurn:
    """A turn that is over."""

    wave: int
    """Turns of which one was open when another was asked for are of one wave, and so are those that go on from one of a wave of
    several conversations; waves follow one another."""
    base: int
    """Number of the turn of its wave that it goes on from; 0: none."""
    place: tuple[str, int]
    """Digest of its request, and how often the episode had made the same one, with it."""
    chat: ChatTurn | None


@dataclass
class _Episode:
    task: Prompt
    seed: int
    session: Session
    transcript: Transcript
    queue: deque[Pending] = field(default_factory=deque)
    """Requests that have come and are not asked for yet."""
    open: dict[int, _OpenTurn] = field(default_factory=dict)
    """Turns that are being sampled, by their numbers."""
    past: dict[int, _PastTurn] = field(default_factory=dict)
    """Turns that are over, by their numbers."""
    turns: int = 0
    """How many were asked for."""
    wave: int = 0
    ids: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """All ids of the segments of turns that are over: of this wave, and of the last turn before it."""
    occurrences: Counter[str] = field(default_factory=Counter)
    """How often each request was made."""
    answered: dict[str, Reply] = field(default_factory=dict)
    """The last answer to each request, for clients that ask again because they have lost it."""
    over_budget: str = ""
    """"max_turns" or "max_tokens", where the last request was refused for it."""

    def base_of(self, context: tuple[int, ...]) -> int:
        """Number of the turn of this wave that a context goes on from, with the longest segment of several; 0: none."""
        wave = {number: ids for number, ids in self.ids.items() if self.past[number].wave == self.wave}
        bases = [number for number, ids in wave.items() if context[: len(ids)] == ids]
        return max(bases, key=lambda number: len(wave[number]), default=0)

    @property
    def forks(self) -> bool:
        """Whether the wave has several conversations."""
        past = [one.base for one in self.past.values() if one.wave == self.wave]
        return [*past, *(one.base for one in self.open.values())].count(0) > 1


class AgentEpisodes:
    """Runs a program for each episode and serves it the policy.

    A turn's seed is made of the content of its request and of how often the episode has made the same one, not of when it came:
    a program that sends several at once gets the same answers, in whichever order they arrive. They are sampled together, and
    stand in the episode's row in an order that their contents make: each request is followed by those that go on from it, and
    of several the one with the smallest digest comes first.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        form: ConversationFormat,
        parser: Callable[[], ToolParser],
        max_tokens: int,
        vocab_size: int,
    ) -> None:
        """Args:
        parser: gives what reads tool calls; called once, when a program first has tools, and raises ValueError where the
            format is unknown.
        max_tokens: most tokens of a context, sampled ones included (environment.max_tokens, or rollout.max_model_len).
        vocab_size: number of token ids that the model has.

        Raises:
            ValueError: a command that cannot be run.
        """
        self._config, self._agent, self._form = config, config.agent, form
        self._parser = parser
        self._read_calls: ToolParser | None = None
        self._limit = max_tokens
        self._served = ServedModel(MODEL, max_tokens, vocab_size)
        self._exchange = Exchange()
        memory = None if config.memory_mib is None else config.memory_mib << 20
        limits = ProgramLimits(
            config.start_timeout_s, config.step_timeout_s, config.episode_timeout_s, memory, self._agent.log_kib << 10
        )
        command = resolve_command(self._agent.command)
        connections = 1024 + 16 * self._agent.processes  # programs that are paused keep theirs
        self._server = EndpointServer(self._exchange, self._served, self._agent.max_request_mib << 20, connections)
        self._programs = Programs(command, limits, self._exchange.put)
        self._episodes: dict[int, _Episode] = {}
        self._to_launch: deque[int] = deque()
        self._running: set[int] = set()
        """Episodes that have one of agent.processes."""
        self._ready: set[int] = set()
        """Episodes that may have a request to ask for."""
        self._counts: Counter[str] = Counter()

    # ---- EpisodeSource

    def start(self, episode: int, task: Prompt, seed: int) -> None:
        """Run the program for this task once one of agent.processes is free."""
        session = self._exchange.open(episode)
        self._episodes[episode] = _Episode(task, seed, session, Transcript(self._form, task.fields))
        self._to_launch.append(episode)
        self._launch()

    def poll(self, wait_s: float) -> list[Ask | Ended]:
        """Turns that programs ask for, and episodes whose program has ended."""
        ended = []
        self._programs.check()
        for event in self._exchange.drain(0.0 if self._ready else wait_s):
            key = event.session.episode if isinstance(event, Pending) else event.episode
            episode = self._episodes.get(key)
            if isinstance(event, Pending):
                self._received(key, episode, event)
            elif episode is not None:
                ended.append(self._exited(key, episode, event))
        ready, self._ready = sorted(self._ready & self._episodes.keys()), set()
        asks = [ask for key in ready for ask in self._asks(key, self._episodes[key])]
        return [*asks, *ended]

    def answer(self, episode: int, turn: int, sample: Sample) -> None:
        """Answer the request for which the turn was sampled."""
        one = self._episodes[episode]
        opened = one.open.pop(turn)
        self._running.add(episode)  # it may have been paused
        one.ids[turn] = (*opened.ask.context, *sample.tokens)
        reply = self._answered(one, opened, sample)
        one.answered[opened.place[0]] = reply
        for pending in opened.waiting:
            pending.finish(reply)

    def pause(self, episode: int) -> None:
        """Another program may run while it waits; see `EpisodeSource.pause`."""
        self._running.discard(episode)
        self._launch()

    def abandon(self, episodes: Collection[int]) -> None:
        """Kill their programs."""
        for key in episodes:
            if key in self._episodes:
                self._programs.end(key)
                self._forget(key, "The episode was given up.")
        self._launch()

    def metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        counts, self._counts = self._counts, Counter()
        return {name: float(count) for name, count in counts.items()}

    def close(self) -> None:
        """Kill all programs and stop serving."""
        self.abandon(list(self._episodes))
        self._programs.close()
        self._server.close()

    # ---- programs

    def _launch(self) -> None:
        while self._to_launch and len(self._running) < self._agent.processes:
            key = self._to_launch.popleft()
            if key in self._episodes:
                one = self._episodes[key]
                self._running.add(key)
                task = json.dumps(one.task.fields)
                self._programs.start(Launch(key, one.session.clock, self._variables(one, task), {TASK_FILE: task}))

    def _variables(self, one: _Episode, task: str) -> dict[str, str]:
        passed = [*PASSED_VARIABLES, *self._agent.pass_env, *(name for name in os.environ if name.startswith("LC_"))]
        variables = {name: os.environ[name] for name in passed if name in os.environ}
        return {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **variables,
            "NO_PROXY": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
            "OPENAI_BASE_URL": f"{self._server.url}/v1",
            "OPENAI_API_KEY": one.session.key,
            "ALIGNER_URL": self._server.url,
            "ALIGNER_MODEL": self._served.name,
            "ALIGNER_TOKENIZER": os.path.abspath(self._form.tokenizer.name_or_path),
            "ALIGNER_SEED": str(one.seed),
            "ALIGNER_TASK_FILE": TASK_FILE,
            **({"ALIGNER_TASK": task} if len(task) <= LONGEST_VARIABLE else {}),
        }

    def _exited(self, key: int, one: _Episode, exited: Exited) -> Ended:
        report, wrong = self._report(one, exited)
        ended, reward, detail = self._outcome(one, exited, report, wrong)
        turns, order = len(one.past), row_order(one.past)
        rewards = (0.0,) * turns
        if report is not None and report.turn_rewards is not None and not math.isnan(reward):
            if len(report.turn_rewards) == turns:
                given = dict(zip(sorted(one.past), report.turn_rewards, strict=True))
                rewards = tuple(given[number] for number in order)
            else:
                ended, reward = "protocol", math.nan
                detail = f"turn_rewards has {len(report.turn_rewards)} numbers for {turns} turns."
        record = {
            "detail": detail,
            "metrics": dict(report.metrics) if report is not None else {},
            "messages": self._messages(one, order),
            "stdout": exited.stdout,
            "stderr": exited.stderr,
        }
        self._forget(key, "The program has ended.")
        self._launch()
        return Ended(key, reward, rewards, ended, record, order if list(order) != sorted(order) else ())

    def _outcome(
        self, one: _Episode, exited: Exited, report: RewardReport | None, wrong: str
    ) -> tuple[str, float, str]:
        """(how the episode has ended, its reward, the detail). `report`, `wrong`: see `_report`."""
        refused = one.over_budget if exited.failure in ("", "crashed") else ""
        if exited.failure and not refused:
            return exited.failure, math.nan, exited.detail
        if not one.turns:
            reason = f"; what it asked for was refused ({refused})" if refused else ""
            return "protocol", math.nan, f"the program ended without a turn{reason}"
        if report is not None:
            return refused or "done", report.reward, exited.detail
        if not self._agent.reports_reward and not exited.failure:
            return refused or "done", 0.0, exited.detail
        if wrong:
            return refused or "no_reward", math.nan, f"the last line of its standard output is no reward: {wrong}"
        detail = (
            'the program reported no reward: POST /v1/reward, or print {"reward": x} last; or set '
            "environment.agent.reports_reward=false where reward rules score the text"
        )
        return refused or "no_reward", math.nan, detail

    def _report(self, one: _Episode, exited: Exited) -> tuple[RewardReport | None, str]:
        """(what the program said of its reward, over HTTP or as the last line that it printed; what is wrong with that line)."""
        if one.session.report is not None:
            return one.session.report, ""
        lines = exited.stdout.strip().splitlines()
        try:
            value = json.loads(lines[-1]) if lines else None
            return reward_report(value) if isinstance(value, dict) and "reward" in value else None, ""
        except ApiError as error:
            return None, error.message
        except (ValueError, RecursionError):
            return None, ""

    def _messages(self, one: _Episode, order: Sequence[int]) -> list[dict[str, Any]]:
        """The conversation of the last chat request, else all text of the last request."""
        chats = [chat for number in order if (chat := one.past[number].chat) is not None]
        if chats or not order:
            return chats[-1].messages if chats else []
        text = decode(self._form.tokenizer, one.ids[order[-1]], keep_special_tokens=True)
        return [{"role": "text", "content": text}]

    def _forget(self, key: int, why: str) -> None:
        one = self._episodes.pop(key)
        self._running.discard(key)
        self._exchange.forget(one.session)
        for pending in [*one.queue, *(pending for opened in one.open.values() for pending in opened.waiting)]:
            pending.finish(ApiError(410, why, code="session_closed"))

    # ---- requests

    def _received(self, key: int, one: _Episode | None, pending: Pending) -> None:
        if one is None:
            pending.finish(ApiError(410, "This episode has ended.", code="session_closed"))
            return
        self._counts["episodes/requests"] += 1
        digest = pending.request.digest
        again = [opened for opened in one.open.values() if pending.retry and opened.place[0] == digest]
        if again:
            again[-1].waiting.append(pending)
        elif pending.retry and digest in one.answered:
            pending.finish(one.answered[digest])
        else:
            one.queue.append(pending)
            self._ready.add(key)

    def _asks(self, key: int, one: _Episode) -> Iterator[Ask]:
        """The turns of an episode for which requests have come."""
        while one.queue:
            pending = one.queue.popleft()
            if not pending.connected():  # its thread, and the program's clock, wait for an answer all the same
                pending.finish(ApiError(410, "The client has closed the connection.", code="client_closed"))
                continue
            try:
                yield self._ask(key, one, pending)
            except ApiError as error:
                self._counts["episodes/requests_refused"] += 1
                pending.finish(error)

    def _ask(self, key: int, one: _Episode, pending: Pending) -> Ask:
        request = pending.request
        assert isinstance(request, ChatRequest | CompletionRequest | GenerateRequest)
        if one.turns >= self._config.max_turns:
            one.over_budget = "max_turns"
            limit = f"environment.max_turns={self._config.max_turns}"
            raise bad_request(f"The episode has had all its turns ({limit}).", code="max_turns")
        if isinstance(request, ChatRequest):
            self._tool_parser(request)  # before anything is sampled
        chat = one.transcript.context(request) if isinstance(request, ChatRequest) else None
        context = chat.ids if chat is not None else self._context(request)
        room = self._limit - len(context)
        if room < 1:
            one.over_budget = "max_tokens"
            message = f"This model's maximum context length is {self._limit} tokens; the request has {len(context)}."
            raise bad_request(message, "messages", "context_length_exceeded")
        one.over_budget = ""
        base = one.base_of(context)
        if not one.open and not (base and one.forks):
            one.wave, base = one.wave + 1, 0
            one.ids = {number: ids for number, ids in one.ids.items() if number == one.turns}
        last = one.ids.get(one.turns)
        one.turns += 1
        one.occurrences[request.digest] += 1
        place = request.digest, one.occurrences[request.digest]
        ask = Ask(
            episode=key,
            turn=one.turns,
            context=context,
            new_segment=last is None or context[: len(last)] != last,
            max_tokens=min(room, request.sampling.max_tokens or room),
            sampling={"stop_token_ids": list(stops)} if (stops := request.sampling.stop_token_ids) else {},
            seed_key=int(_hashed(*map(str, place))[:12], 16),
        )
        one.open[ask.turn] = _OpenTurn(ask, request, chat, place, base, [pending])
        return ask

    def _context(self, request: ChatRequest | CompletionRequest | GenerateRequest) -> tuple[int, ...]:
        if isinstance(request, GenerateRequest):
            return request.token_ids
        assert isinstance(request, CompletionRequest)
        if not isinstance(request.prompt, str):
            return request.prompt
        return tuple(encode_text(self._form.tokenizer, request.prompt))

    def _tool_parser(self, request: ChatRequest) -> ToolParser:
        """Raises ValueError for a template that takes no tool calls, or writes them in an unknown format."""
        if not request.parse_tool_calls:
            return no_tools
        if self._read_calls is None:
            self._form.check_tools()
            self._read_calls = self._parser()
        return self._read_calls

    def _answered(self, one: _Episode, opened: _OpenTurn, sample: Sample) -> Reply:
        """The answer to the request, which is recorded in the transcript."""
        request, tokens = opened.request, tuple(sample.tokens)
        stops = request.sampling.stop_token_ids or ()
        place = _hashed(*map(str, opened.place))
        parser: ToolParser = no_tools
        reading: dict[str, Any] = {}
        if isinstance(request, ChatRequest):
            assert opened.chat is not None
            parser = self._tool_parser(request)
            opens = opened.chat.conversation.opens_reasoning
            reading = {"tools": request.tools, "opened": opens, "several_calls": request.several_calls}
        turn = read_turn(self._form, tokens, stops, parser, request.sampling.stop, place, **reading)
        chat = None
        if isinstance(request, ChatRequest):
            assert opened.chat is not None
            chat = one.transcript.record(request, opened.chat, tokens, turn)
        one.past[opened.ask.turn] = _PastTurn(one.wave, opened.base, opened.place, chat)
        texts = [decode(self._form.tokenizer, [token], keep_special_tokens=True) for token in tokens * request.logprobs]
        return Reply(
            id=f"{'chatcmpl' if opened.chat else 'cmpl'}-{place[:24]}",
            model=MODEL,
            prompt_tokens=len(opened.ask.context),
            tokens=tokens,
            logp=tuple(sample.logp),
            versions=tuple(sample.versions),
            token_texts=texts,
            text=turn.returned["content"] if opened.chat else turn.text,
            reasoning=turn.returned.get("reasoning_content"),
            tool_calls=turn.returned.get("tool_calls", ()),
            truncated=sample.truncated and not turn.cut,
            stop_token=tokens[-1] if tokens and tokens[-1] in stops and not sample.truncated else None,
        )


def row_order(turns: Mapping[int, _PastTurn]) -> tuple[int, ...]:
    """Numbers of the turns in the order in which they stand in the episode's row, which does not depend on when requests of one wave
    came: each is followed by those that go on from it, and of several the one with the smallest digest comes first."""
    behind: dict[int, list[int]] = {}
    """Number of a turn -> those that go on from it; 0: the first ones, of all waves."""
    for number in sorted(turns, key=lambda number: (turns[number].wave, turns[number].place), reverse=True):
        behind.setdefault(turns[number].base, []).append(number)
    order, rest = [], behind.get(0, [])
    while rest:
        order.append(rest.pop())
        rest += behind.get(order[-1], [])
    return tuple(order)


def _hashed(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
