"""The chat conversations of one episode: a request that goes on from an answer keeps the ids that were sampled for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner.environments.conversation import Conversation, ConversationFormat, TemplateError
from aligner.environments.endpoint.errors import bad_request
from aligner.environments.endpoint.requests import ChatRequest
from aligner.environments.endpoint.sampled_turn import ReadTurn

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatContext:
    """The context of a chat request."""

    ids: tuple[int, ...]
    conversation: Conversation
    """Up to this context."""


@dataclass(frozen=True)
class _Answered:
    """A request that was answered, from which later ones may go on."""

    request: ChatRequest
    context: ChatContext
    sampled: Sequence[int]
    returned: Message
    """The assistant's message as the program got it."""
    rendered: Message
    """The same as the chat template takes it."""

    def begins(self, request: ChatRequest) -> bool:
        """Whether a request repeats this one, and then the answer, and has something new after it."""
        base = self.request.messages
        count = len(base)
        return (
            len(request.messages) > count + 1
            and request.tools == self.request.tools
            and request.messages[:count] == base
            and same_turn(self.returned, request.messages[count])
        )


class Transcript:
    """All answered chat requests of one episode. Sub-agents and earlier turns that are asked again are branches."""

    def __init__(self, chat: ConversationFormat, row: Mapping[str, Any]) -> None:
        self._chat, self._row = chat, row
        self._answered: list[_Answered] = []
        self._last: list[Message] = []

    def context(self, request: ChatRequest) -> ChatContext:
        """The ids of a request's context: those of the longest answered request that it goes on from, and a rendered suffix; or,
        where there is none (the first request, a history that the program has changed), the whole rendered anew.

        Raises:
            ApiError: 400, for messages that the chat template does not take.
        """
        if request.messages[-1]["role"] == "assistant":
            raise bad_request("messages ends with the assistant's turn; end with a user's or a tool's.", "messages")
        branches = [one for one in self._answered if one.begins(request)]
        if not branches:
            return self._opened(request)
        last = max(branches, key=lambda one: len(one.request.messages))
        conversation = copy.copy(last.context.conversation)
        new = request.messages[len(last.request.messages) + 1 :]
        try:
            extension = conversation.extend(last.sampled, last.rendered, new)
        except TemplateError as error:
            raise bad_request(f"The chat template does not take these messages: {error}", "messages") from None
        return ChatContext(extension.ids, conversation)

    def record(self, request: ChatRequest, context: ChatContext, sampled: Sequence[int], turn: ReadTurn) -> None:
        """A request was answered."""
        self._last = [*request.messages, turn.returned]
        if not turn.cut:
            self._answered.append(_Answered(request, context, sampled, turn.returned, turn.rendered))

    def messages(self) -> list[Message]:
        """The conversation of the last answered request, with its answer."""
        return self._last

    def _opened(self, request: ChatRequest) -> ChatContext:
        conversation = Conversation(self._chat)
        try:
            ids = conversation.open(request.messages, request.tools or None, self._row)
        except ValueError as error:
            raise bad_request(f"The chat template does not take these messages: {error}", "messages") from None
        return ChatContext(tuple(ids), conversation)


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
