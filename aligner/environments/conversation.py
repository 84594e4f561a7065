"""`Conversation`: an episode's context as token ids, which grows by what is sampled and by what the chat template adds.

What was sampled is never decoded and encoded again. Of each new context only the suffix is rendered and encoded: what the
template writes after the assistant's turn, the new messages, the generation prompt. Where it begins is found by rendering the
conversation twice, with two different ends of the assistant's turn: what both have in common at their end comes after the turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aligner.data.chat import NO_TOOLS, PLAIN, ChatOptions, Notes, conversation_of, message_text, template_options
from aligner.data.decoding import decode
from aligner.data.end_tokens import PROBES, closing_tokens
from aligner.data.tokenizer import Message, checked_messages, encode_plain, render_chat
from aligner.environments.reasoning import CLOSING, OPENING, inner_reasoning, split_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITTEN = ("segment", "keep", "error")
"""What is done where the chat template rewrites the history (environment.rewritten)."""
TOOL_PROBE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"value": {"type": "string"}}, "required": ["value"]},
    },
}
"""Definition of a tool with which a template is tried."""


class TemplateError(ValueError):
    """A conversation that cannot go on under this chat template; the episode fails with it."""


@dataclass(frozen=True)
class Extension:
    """The context of an episode's next turn."""

    ids: tuple[int, ...]
    """The whole context."""
    new_segment: bool
    """False: the context before, the sampled ids, and a suffix. True: the template rewrote the history, and this is the whole
    conversation rendered anew."""


class ConversationFormat:
    """A tokenizer and its chat template, as the conversations of one job use them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[int] = (),
        chat: ChatOptions = PLAIN,
        rewritten: str = "segment",
    ) -> None:
        """Args:
        stop: tokens that end a turn where it is sampled (sampling.stop_token_ids, or the model's own).
        chat: how conversations are rendered (data.system_prompt, data.chat_template_kwargs).
        rewritten: "segment", "keep" or "error", see `Conversation.extend`.

        Raises:
            ValueError: no chat template, or an unknown `rewritten`.
        """
        if rewritten not in REWRITTEN:
            raise ValueError(f"environment.rewritten={rewritten} must be one of {', '.join(REWRITTEN)}.")
        if not tokenizer.chat_template:
            raise ValueError(
                "environment.target: conversations with an environment need a chat template and the tokenizer has none; set "
                "data.chat_template=FILE.jinja, or environment.target='' for prompts without an environment."
            )
        self.tokenizer, self.chat, self.rewritten = tokenizer, chat, rewritten
        self.tools_left_out = 0
        """Conversations whose tools the template has not written."""
        entries = {token: entry for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip()}
        self.added = {token: entry.content for token, entry in entries.items()}
        """Special and other added tokens, which stand for themselves wherever their text occurs."""
        self.special = {token: entry.content for token, entry in entries.items() if entry.special}
        """The special tokens among them."""
        self.ends = {token for token in (*stop, *closing_tokens(tokenizer)) if token in self.added}
        """Added tokens that end a turn; another stop token ends what is sampled, and the template's end of turn follows it."""
        self._learn_inner_end()

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return tuple(self.special.values())

    def _learn_inner_end(self) -> None:
        """Some templates (gpt-oss) close a turn with another token once more turns follow: it counts as an end too."""
        asked, more = {"role": "user", "content": "Which?"}, {"role": "user", "content": "And then?"}
        try:
            inner, last = (
                _common_suffix(
                    *(
                        self.render([asked, {"role": "assistant", "content": probe}, *after], {}, False)
                        for probe in PROBES
                    )
                )
                for after in ((more,), ())
            )
        except ValueError:
            return  # a template that refuses these; the real conversation will show what it takes
        if self.first_end(last) is None:
            return
        self.ends.update(token for token, text in self.added.items() if inner.startswith(text))

    def render(self, messages: Sequence[Message], options: Mapping[str, Any], awaits: bool) -> str:
        """The messages as the template writes them; `awaits`: with the generation prompt."""
        return render_chat(self.tokenizer, messages, "the episode", awaits, options)

    def first_end(self, text: str) -> tuple[int, str] | None:
        """(position, text) of the first token in a rendered text that ends turns; None: there is none."""
        texts = [self.added[token] for token in self.ends]
        places = [(place, end) for end in texts if (place := text.find(end)) >= 0]
        return min(places, key=lambda one: (one[0], -len(one[1]))) if places else None

    def check_tools(self) -> None:
        """Raises ValueError if the template does not render tool calls and their results."""
        call = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {"value": "one"}}}
        messages: list[Message] = [
            {"role": "user", "content": "Try it."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "seventeen", "tool_call_id": "call00001", "name": "probe"},
        ]
        places = [f"messages[{turn}]" for turn in range(len(messages))]
        try:
            conversation_of(messages, places, {"tools": [TOOL_PROBE]}, "a tool call", self.tokenizer, awaits=True)
        except ValueError as error:
            raise ValueError(
                f"environment.target: the environment has tools, and the chat template does not take them ({error}); set "
                "data.chat_template to one that renders tool calls and messages of the role 'tool'."
            ) from error


@dataclass(frozen=True)
class Growth:
    """What a conversation has more than before a turn, so that the states of one after each turn need not all be kept whole."""

    messages: tuple[Message, ...]
    kept_ids: int
    """So many of the ids before are kept, and `ids` follow."""
    ids: tuple[int, ...]
    kept_text: int
    """So many characters of what was rendered before are kept, and `text` follows."""
    text: str


@dataclass
class Conversation:
    """One episode's messages and the token ids of its current segment."""

    format: ConversationFormat
    messages: list[Message] = field(default_factory=list)
    """All so far, in the form in which they were given."""
    ids: list[int] = field(default_factory=list)
    """The context of the turn that is to be sampled next."""
    _options: dict[str, Any] = field(default_factory=dict)
    _rendered: str = ""
    """The messages as rendered when the last turn was asked for, with the generation prompt."""
    _closed: set[bool] = field(default_factory=set)
    """Kinds of turns (with tool calls or without) of which it is known that the template closes them with a token."""

    def since(self, before: Conversation) -> Growth:
        """What it has more than an earlier state of itself, before some turns."""
        ids, text = len(before.ids), len(before._rendered)
        ids = ids if self.ids[:ids] == before.ids else 0
        text = text if self._rendered.startswith(before._rendered) else 0
        new = self.messages[len(before.messages) :]
        return Growth(tuple(new), ids, tuple(self.ids[ids:]), text, self._rendered[text:])

    def grown(self, growth: Growth) -> Conversation:
        """The later state; see `since`."""
        return replace(
            self,
            messages=[*self.messages, *growth.messages],
            ids=[*self.ids[: growth.kept_ids], *growth.ids],
            _rendered=self._rendered[: growth.kept_text] + growth.text,
        )

    def open(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        row: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """The first context.

        Args:
            messages: a system prompt, if any, and the task.
            tools: definitions (JSON schemas) of the tools that may be called.
            row: the task's row; its chat_template_kwargs are passed to the template.

        Raises:
            ValueError: messages that are none, or that the template does not render.
        """
        messages = checked_messages([dict(message) for message in messages], "the episode")
        kwargs = {"chat_template_kwargs": (row or {}).get("chat_template_kwargs"), "tools": list(tools or [])}
        self._options = template_options(kwargs, "the episode", self.format.chat.template_kwargs)
        places = [f"messages[{place}]" for place in range(len(messages))]
        self.messages, _, _ = self.format.chat.with_system_prompt(messages, places, "the episode")
        notes = Notes()
        _, self._rendered = self._form(self.messages, notes)
        self.format.tools_left_out += notes[NO_TOOLS]
        self.ids = encode_plain(self.format.tokenizer, self._rendered)
        return tuple(self.ids)

    @property
    def opens_reasoning(self) -> bool:
        """Whether the generation prompt of the turn that is sampled next has opened its reasoning (<think>)."""
        return self._rendered.rstrip().endswith(OPENING)

    def extend(self, sampled: Sequence[int], assistant: Message, new: Sequence[Message]) -> Extension:
        """The context of the next turn.

        The template may write the turns so far otherwise than before, once others follow: it drops their reasoning, moves the
        system prompt, or drops what the generation prompt opened. `ConversationFormat.rewritten` says what is done then:
        "segment": the next context is the conversation rendered anew, a segment of its own; "keep": the turns stay as they were
        sampled; "error".

        A stop token that ended the turn stands in place of the token with which the template closes turns; a turn that was cut
        off without one is closed as the template does.

        Args:
            sampled: the last turn's ids, with the stop token where one was sampled.
            assistant: the last turn as a message, for the template.
            new: what follows it: tool results, a user's turn.

        Raises:
            TemplateError: the template does not take these messages, or the suffix has no tokens of its own.
            ValueError: the history is rewritten, and rewritten=error.
        """
        turn = len(self.messages)
        history = [*self.messages, assistant, *new]
        form, rendered = self._form(history)
        after = self._shared_end(form, turn, form[turn + 1 :], awaits=True)
        reason = self._rewritten_reason(rendered, after, assistant)
        if reason is not None and self.format.rewritten == "error":
            raise ValueError(
                f"environment.rewritten=error: the chat template rewrites the conversation once it goes on ({reason}); use "
                "environment.rewritten=segment (each such turn begins a new segment), =keep (the turns stay as they were "
                "sampled), or another data.chat_template."
            )
        if reason is not None and self.format.rewritten == "segment":
            self.ids = encode_plain(self.format.tokenizer, rendered)
        else:
            self.ids = [*self.ids, *sampled, *self._suffix_ids(sampled, *self._ending(form, turn, after))]
        self.messages, self._rendered = history, rendered
        return Extension(tuple(self.ids), reason is not None and self.format.rewritten == "segment")

    def _form(self, messages: list[Message], notes: Notes | None = None) -> tuple[list[Message], str]:
        """(the messages in the form that the template accepts, the conversation with the generation prompt)."""
        places = [f"messages[{place}]" for place in range(len(messages))]
        try:
            made = conversation_of(
                messages,
                places,
                self._options,
                "the episode",
                self.format.tokenizer,
                awaits=True,
                notes=notes,
            )
        except ValueError as error:
            raise TemplateError(str(error)) from error
        return made.messages, made.text(len(messages), awaits=True)

    def _shared_end(self, form: list[Message], turn: int, more: list[Message], awaits: bool) -> str:
        """What two renderings with different ends of assistant message `turn`, and with `more` after it, have in common at
        their end."""
        versions = [[*form[:turn], _ending_with(form[turn], probe), *more] for probe in PROBES]
        try:
            return _common_suffix(*(self.format.render(version, self._options, awaits) for version in versions))
        except ValueError as error:
            raise TemplateError(str(error)) from error

    def _rewritten_reason(self, rendered: str, after: str, assistant: Message) -> str | None:
        """How this rendering differs from the turns as they were read and sampled; None: it keeps them."""
        if not rendered.startswith(self._rendered):
            common = len(_common_prefix(rendered, self._rendered))
            was, now = self._rendered[common:][:40], rendered[common:][:40]
            return f"{was!r} has become {now!r}"
        turn = rendered[len(self._rendered) : len(rendered) - len(after)]
        for part in _parts(assistant):
            if part not in turn:
                return f"the turn's {part[:40]!r} is left out"
        return None

    def _suffix_ids(self, sampled: Sequence[int], closing: str, text: str) -> list[int]:
        """Ids of what follows the sampled turn; see `_ending`."""
        form = self.format
        stop = sampled[-1] if sampled and sampled[-1] in form.ends else None
        if stop is None:
            return self._behind_turn(sampled, closing + text)
        if closing:  # the token that was sampled stands in its place
            return self._behind(stop, text)
        return self._behind(stop, text.removeprefix(form.added[stop]))  # the next turn's opener ends this one (GLM)

    def _ending(self, form: list[Message], turn: int, after: str) -> tuple[str, str]:
        """How the template ends assistant message `turn`.

        Args:
            after: what it writes after what can vary in the turn.

        Returns:
            (the token that ends the turn, "" if the template has none; what follows it).

        Raises:
            TemplateError: it cannot be found.
        """
        called, find = bool(form[turn].get("tool_calls")), self.format.first_end
        if called in self._closed:
            end = find(after)
        else:
            last = self._shared_end(form, turn, [], awaits=False)  # the turn as the last of the conversation
            end = find(_common_prefix(after, last))
            if end is None and not called and find(last) is not None:
                end = find(after)  # the last turn is closed otherwise (gpt-oss)
            if end is None and (find(last) is not None or not after.startswith(last)):
                raise TemplateError(
                    f"the chat template closes the turn with {last[:40]!r}, in which no stop token occurs; name the token "
                    "that ends such turns: sampling.stop_token_ids=[...]."
                )
            if end is None:  # what closes a tool call is part of the turn; plain text after an answer is the template's
                return "", after[len(last) :] if called else after
            self._closed.add(called)
        if end is None:
            raise TemplateError("the chat template has closed turns with a stop token, and does not close this one.")
        place, closing = end
        return closing, after[place + len(closing) :]

    def _behind(self, token: int, text: str) -> list[int]:
        """Ids of text after a stop token, as they are in the conversation encoded as a whole."""
        ids = encode_plain(self.format.tokenizer, self.format.added[token] + text)
        if ids[:1] != [token]:
            raise TemplateError(
                f"the tokenizer merges the stop token {self.format.added[token]!r} with what follows it; use a special token "
                "as stop token: sampling.stop_token_ids=[...]."
            )
        return ids[1:]

    def _behind_turn(self, sampled: Sequence[int], text: str) -> list[int]:
        """Ids of text after a turn that has no stop token."""
        tokenizer = self.format.tokenizer
        ids = encode_plain(tokenizer, text)
        if ids and text.startswith(self.format.added.get(ids[0], "\0")):
            return ids  # it begins with an added token: nothing merges across
        # Proven on this turn: from the last added token of the context on, all encodes to the very same ids first.
        start = max((place for place, token in enumerate(self.ids) if token in self.format.added), default=0)
        context = [*self.ids[start:], *sampled]
        joint = encode_plain(tokenizer, decode(tokenizer, context, keep_special_tokens=True) + text)
        if joint[: len(context)] == context:
            return joint[len(context) :]
        raise TemplateError(
            "the turn was cut off without a stop token, and the chat template goes on with plain text that the tokenizer merges "
            "with it; raise sampling.max_tokens, or use a data.chat_template that closes turns with a special token."
        )


def prompt_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a task's row: its 'messages', its 'prompt' as a user's, or none."""
    if "messages" in row:
        return [dict(message) for message in row["messages"]]
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        return [dict(message) for message in prompt]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else []


def _ending_with(message: Message, probe: str) -> Message:
    """The assistant's message with another end, which the template writes last: of its last tool call, or of its content."""
    if not message.get("tool_calls"):
        return {**message, "content": _appended(message.get("content"), probe)}
    *calls, last = message["tool_calls"]
    inner = last.get("function") if isinstance(last.get("function"), dict) else None
    holder = dict(inner if inner is not None else last)
    arguments = holder.get("arguments")
    holder["arguments"] = json.dumps({"probe": probe}) if isinstance(arguments, str) else {"probe": probe}
    return {**message, "tool_calls": [*calls, {**last, "function": holder} if inner is not None else holder]}


def _appended(content: Any, probe: str) -> Any:
    return [*content, {"type": "text", "text": probe}] if isinstance(content, list) else f"{content or ''} {probe}"


def _parts(assistant: Message) -> list[str]:
    """What of an assistant's turn must be in its rendering: its reasoning, its words, the names of its calls."""
    content = message_text(assistant)
    reasoning, visible = split_reasoning(content)
    parts = [inner_reasoning(reasoning), visible] if reasoning.endswith(CLOSING) else [content]
    parts += [str(assistant[key]) for key in ("reasoning_content", "thinking") if assistant.get(key)]
    for call in assistant.get("tool_calls") or []:
        parts.append(str((call.get("function") or call).get("name", "")))
    return [part.strip() for part in parts if part.strip()]


def _common_prefix(left: str, right: str) -> str:
    size = min(len(left), len(right))
    return left[: next((k for k in range(size) if left[k] != right[k]), size)]


def _common_suffix(left: str, right: str) -> str:
    return _common_prefix(left[::-1], right[::-1])[::-1]
