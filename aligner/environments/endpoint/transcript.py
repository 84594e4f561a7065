"""The chat conversations of one episode: a request that goes on from an answer keeps the ids that were sampled for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligner.environments.conversation import Conversation, ConversationFormat, Growth, TemplateError
from aligner.environments.endpoint.errors import bad_request
from aligner.environments.endpoint.requests import ChatRequest
from aligner.environments.endpoint.sampled_turn import ReadTurn

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatContext:
    """The context of a chat request."""

    conversation: Conversation
    """Up to this context."""
    base: ChatTurn | None
    """The answered request that it goes on from."""
    before: Conversation | None
    """That of `base`."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the context."""
        return tuple(self.conversation.ids)


@dataclass(eq=False)
class ChatTurn:
    """A request that was answered, from which later ones may go on. It keeps what is new in it: the rest is that of `base`, so that
    an episode's memory grows with its tokens, not with their square."""

    base: ChatTurn | None
    state: Conversation | Growth
    """The conversation up to its context: whole where it goes on from none, else what it has more than that of `base`."""
    given: tuple[Message, ...]
    """Messages of the request behind the answer of `base`."""
    count: int
    """Messages of the whole request."""
    tools: tuple[dict[str, Any], ...]
    sampled: tuple[int, ...]
    returned: Message
    """The assistant's message as the program got it."""
    rendered: Message
    """The same as the chat template takes it."""
    branches: list[ChatTurn] = field(default_factory=list)
    """Those that go on from it."""

    def begins(self, request: ChatRequest) -> bool:
        """Whether a request that goes on from `base` repeats this one's own messages and its answer, and has something new behind."""
        messages = request.messages
        return (
            len(messages) > self.count + 1
            and messages[self.count - len(self.given) : self.count] == self.given
            and same_turn(self.returned, messages[self.count])
        )

    @property
    def path(self) -> list[ChatTurn]:
        """All that it goes on from, from the first request to itself."""
        turns, base = [self], self.base
        while base is not None:
            turns.append(base)
            base = base.base
        return turns[::-1]

    @property
    def messages(self) -> list[Message]:
        """The request's messages, with the answers in it and its own."""
        return [message for turn in self.path for message in (*turn.given, turn.returned)]

    @property
    def conversation(self) -> Conversation:
        """The conversation up to its context."""
        conversation: Conversation | None = None
        for turn in self.path:
            if isinstance(turn.state, Conversation):
                conversation = turn.state
            else:
                assert conversation is not None
                conversation = conversation.grown(turn.state)
        assert conversation is not None
        return conversation


class Transcript:
    """All answered chat requests of one episode. Sub-agents and earlier turns that are asked again are branches."""

    def __init__(self, chat: ConversationFormat, row: Mapping[str, Any]) -> None:
        self._chat, self._row = chat, row
        self._first: list[ChatTurn] = []
        """Those that go on from none."""
        self._last: tuple[ChatTurn, Conversation] | None = None
        """The one that was answered last, from which most requests go on, and its conversation."""

    def context(self, request: ChatRequest) -> ChatContext:
        """The ids of a request's context: those of the longest answered request that it goes on from, and a rendered suffix; or,
        where there is none (the first request, a history that the program has changed), the whole rendered anew.

        Raises:
            ApiError: 400, for messages that the chat template does not take.
        """
        if request.messages[-1]["role"] == "assistant":
            raise bad_request("messages ends with the assistant's turn; end with a user's or a tool's.", "messages")
        base = self._longest(request)
        if base is None:
            return self._opened(request)
        before = self._last[1] if self._last is not None and self._last[0] is base else base.conversation
        conversation = copy.copy(before)
        try:
            conversation.extend(base.sampled, base.rendered, request.messages[base.count + 1 :])
        except TemplateError as error:
            raise bad_request(f"The chat template does not take these messages: {error}", "messages") from None
        return ChatContext(conversation, base, before)

    def record(self, request: ChatRequest, context: ChatContext, sampled: Sequence[int], turn: ReadTurn) -> ChatTurn:
        """A request was answered."""
        base, conversation = context.base, context.conversation
        answered = ChatTurn(
            base,
            conversation if context.before is None else conversation.since(context.before),
            request.messages[0 if base is None else base.count + 1 :],
            len(request.messages),
            request.tools,
            tuple(sampled),
            turn.returned,
            turn.rendered,
        )
        if not turn.cut:
            (self._first if base is None else base.branches).append(answered)
            self._last = answered, conversation
        return answered

    def _longest(self, request: ChatRequest) -> ChatTurn | None:
        """The answered request with the most messages that a request goes on from; of several (equal texts of other ids) not the first
        that was answered, which need not be the same in another run, but that with the smallest ids."""
        best: ChatTurn | None = None
        rest = [one for one in self._first if one.tools == request.tools]
        while rest:
            one = rest.pop()
            if one.begins(request):
                if best is None or (-one.count, one.sampled) < (-best.count, best.sampled):
                    best = one
                rest += one.branches
        return best

    def _opened(self, request: ChatRequest) -> ChatContext:
        conversation = Conversation(self._chat)
        try:
            conversation.open(request.messages, request.tools or None, self._row)
        except ValueError as error:
            raise bad_request(f"The chat template does not take these messages: {error}", "messages") from None
        return ChatContext(conversation, None, None)


def same_turn(returned: Message, given: Message) -> bool:
    """Whether a message is the assistant's turn that was returned. Programs may leave out its reasoning and the ids of its calls,
    and write the arguments' JSON otherwise; all else must be equal."""
    if given["role"] != "assistant" or (given.get("content") or "") != (returned.get("content") or ""):
        return False
    reasoning = given.get("reasoning_content") or given.get("reasoning")
    if reasoning and reasoning != returned.get("reasoning_content"):
        return False
    calls, others = returned.get("tool_calls") or [], given.get("tool_calls") or []
    return len(calls) == len(others) and all(_same_call(*pair) for pair in zip(calls, others, strict=True))


def _same_call(call: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if other.get("id") not in (None, call.get("id")) or call["function"]["name"] != other["function"]["name"]:
        return False
    return _parsed(call["function"]["arguments"]) == _parsed(other["function"]["arguments"])


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
