"""Render conversations with the model's chat template, and check that the template drops no message or tool call."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from aligner.data.tokenizer import Message, render_chat, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCHES = ("train", "weight")
"""Keys of a message that say whether it is trained on: true or false, 1 or 0. They are not passed to the template."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys in which data sets store a turn's reasoning."""
RESERVED_ARGUMENTS = (
    "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of `apply_chat_template` that a row cannot set."""
NO_TOOLS = "rows with 'tools' that the chat template does not render"

Notes = Counter[str]
"""Remark on how rows were tokenized -> number of rows."""
SYSTEM_ROLES = ("system", "developer")
"""Roles of a first message that a system prompt for all rows replaces."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered, for all rows of a data set."""

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template (data.chat_template_kwargs); a row's own take precedence."""
    system_prompt: str | None = None
    """System prompt in place of the rows' own (data.system_prompt); "" for none, None: as each row has it."""

    def with_system_prompt(
        self, messages: Sequence[Message], places: Sequence[str], label: str
    ) -> tuple[list[Message], list[str], int]:
        """The messages with this system prompt in front.

        Args:
            places: where each message is in the row, for errors.

        Returns:
            (messages, their places, by how many messages the others have moved: -1, 0 or 1).

        Raises:
            ValueError: there is nothing but a system prompt.
        """
        if self.system_prompt is None:
            return list(messages), list(places), 0
        replaced = int(messages[0]["role"] in SYSTEM_ROLES)
        if replaced == len(messages):
            raise ValueError(f"{label}: 'messages' has nothing but the system prompt; give the user's message too.")
        added = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        kept = list(messages)[replaced:]
        return [*added, *kept], [*["data.system_prompt"] * len(added), *list(places)[replaced:]], len(added) - replaced

    def check_text(self, key: str, label: str) -> None:
        """Raises ValueError for a row whose `key` is plain text, which has no system prompt to replace."""
        if self.system_prompt is not None:
            raise ValueError(
                f"{label}: data.system_prompt is for conversations, and {key!r} of this row is plain text; give lists of "
                "messages, or set data.system_prompt=null."
            )


PLAIN = ChatOptions()
"""Everything as the rows have it."""


@dataclass(frozen=True)
class Conversation:
    """Messages in a form that the template accepts, with cached renderings."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    options: dict[str, Any]
    """Further variables of the template."""
    label: str
    """The row's file and line, for errors."""
    _written: dict[tuple[int, bool], str] = field(default_factory=dict)

    def text(self, turns: int, awaits: bool) -> str:
        """The first `turns` messages as rendered by the template; `awaits`: with the generation prompt."""
        key = (turns, awaits)
        if key not in self._written:
            self._written[key] = render_chat(self.tokenizer, self.messages[:turns], self.label, awaits, self.options)
        return self._written[key]


def conversation_of(
    messages: Sequence[Message],
    places: Sequence[str],
    options: Mapping[str, Any],
    label: str,
    tokenizer: PreTrainedTokenizerBase,
    awaits: bool,
    notes: Notes | None = None,
) -> Conversation:
    """Prepare messages (from `checked_messages`) for the template.

    Contents given as lists of parts, and tool calls whose arguments are JSON text, are converted if the template needs
    another form.

    Args:
        places: where each message is in the row, for errors.
        options: see `template_options`.
        awaits: render with the generation prompt.
        notes: counter of things to report about how rows were tokenized.

    Raises:
        ValueError: the template raises for these messages, or drops one of them or its tool calls.
    """
    thinks = any(key in message for message in messages for key in REASONING)
    keys = _reasoning_keys(tokenizer) if thinks else []
    cleaned = [_cleaned(message, f"{label}: {place}", keys) for message, place in zip(messages, places, strict=True)]

    def make(form: list[Message]) -> Conversation:
        conversation = Conversation(tokenizer, form, dict(options), label)
        conversation.text(len(form), awaits)
        return conversation

    conversation: Conversation | None = _without_none(_first_accepted_form(cleaned, make, awaits), make, awaits)
    assert conversation is not None
    left_out = _dropped_message_error(conversation, places, awaits)
    if left_out:
        conversation = _in_parts(cleaned, make, awaits)
        if conversation is None or _dropped_message_error(conversation, places, awaits):
            raise ValueError(left_out)
    if notes is not None and options.get("tools") and not _writes_tools(conversation, awaits):
        notes[NO_TOOLS] += 1
    return conversation


def template_options(row: Mapping[str, Any], label: str, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables for the template from a row and from data.chat_template_kwargs.

    Args:
        row: may have 'tools', a list of definitions (JSON schemas) or its JSON text, and 'chat_template_kwargs', further
            variables; missing, null and empty mean none.
        defaults: data.chat_template_kwargs; the row's own take precedence.

    Raises:
        ValueError: wrong type, or a variable that a row cannot set.
    """
    kwargs = _parsed(row.get("chat_template_kwargs"), f"{label}: 'chat_template_kwargs'")
    if kwargs and not isinstance(kwargs, dict):
        raise ValueError(
            f"{label}: 'chat_template_kwargs' must be an object such as {{\"enable_thinking\": false}}, not "
            f"{shortened(kwargs)}."
        )
    options = {**(defaults or {}), **(kwargs or {})}
    for name in RESERVED_ARGUMENTS:
        if name in options:
            advice = "give it as a field of the row" if name == "tools" else "remove it"
            raise ValueError(f"{label}: 'chat_template_kwargs' cannot set {name!r}; {advice}.")
    tools = _parsed(row.get("tools"), f"{label}: 'tools'")
    if tools:
        tools = [_parsed(tool, f"{label}: 'tools'") for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ValueError(
                f"{label}: 'tools' must be a list of definitions such as "
                f'{{"type": "function", "function": {{"name": "...", "parameters": {{}}}}}}, not {shortened(tools)}.'
            )
        options["tools"] = tools
    return options


def check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], setting: str = "data.chat_template_kwargs."
) -> None:
    """Raises ValueError for variables (set for all rows) that do not occur in this tokenizer's template."""
    template = tokenizer.chat_template or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    for name in kwargs:
        if name in RESERVED_ARGUMENTS:
            raise ValueError(f"{setting}{name} cannot be set; remove it.")
        if name not in ("chat_template", "documents") and not re.search(rf"\b{re.escape(name)}\b", source):
            raise ValueError(
                f"{setting}{name} is not a variable of the tokenizer's chat template; remove it, or correct its name."
            )


def message_text(message: Message) -> str:
    """A message's content as one text; "" if it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _reasoning_keys(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The keys of REASONING that the chat template reads."""
    template = tokenizer.chat_template or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    read = r"""\.{0}\b|\[\s*['"]{0}['"]\s*\]|get\(\s*['"]{0}['"]"""
    return [key for key in REASONING if re.search(read.format(key), source)]


def _cleaned(message: Message, place: str, reasoning_keys: Sequence[str]) -> Message:
    """The message without "train", "weight" and null keys (columnar data sets fill missing keys with null), and its reasoning
    under a key that the template reads.

    Args:
        reasoning_keys: see `_reasoning_keys`.
    """
    cleaned = {
        key: value for key, value in message.items() if key not in SWITCHES and (value is not None or key == "content")
    }
    given = [key for key in REASONING if key in cleaned]
    if reasoning_keys and len(given) == 1 and given[0] not in reasoning_keys:
        cleaned[reasoning_keys[0]] = cleaned.pop(given[0])
    if "tool_calls" in cleaned:
        calls = _parsed(cleaned.pop("tool_calls"), f"{place}: 'tool_calls'")
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise ValueError(
                f"{place}: 'tool_calls' must be a list such as "
                f'[{{"type": "function", "function": {{"name": "...", "arguments": {{}}}}}}], not {shortened(calls)}.'
            )
        cleaned |= {"tool_calls": calls} if calls else {}
    if cleaned.get("content") is None and "tool_calls" not in cleaned:
        raise ValueError(f"{place} has neither 'content' nor 'tool_calls'.")
    return cleaned


def _parsed(value: Any, name: str) -> Any:
    """JSON text -> its value; other types unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from None


def _first_accepted_form(
    messages: list[Message], make: Callable[[list[Message]], Conversation], awaits: bool
) -> Conversation:
    """The messages unchanged if the template renders them correctly, else in the first form that it does."""
    first_accepted: Conversation | None = None
    first_error: ValueError | None = None
    for form in _forms(messages):
        try:
            conversation = make(form)
        except ValueError as error:
            first_error = first_error or error
            continue
        if _renders_properly(conversation, awaits):
            return conversation
        first_accepted = first_accepted or conversation
    if first_accepted is None:
        assert first_error is not None
        raise first_error
    return first_accepted


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    contents = [messages]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append(
            [{**m, "content": message_text(m)} if isinstance(m.get("content"), list) else m for m in messages]
        )
    if any(not message.get("content") for message in messages if "tool_calls" in message):
        # beside tool calls, some templates take null alone for no content, others text alone
        contents += [[_without_content(m, empty) for m in form] for empty in ("", None) for form in contents]
    calls: list[Callable[[Any], Any]] = [lambda given: given]
    arguments = [function.get("arguments") for message in messages for function in _functions(message)]
    if any(isinstance(given, str) for given in arguments):
        calls.append(_as_object)
    if any(isinstance(given, dict) for given in arguments):
        calls.append(lambda given: json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given)
    for change, form in product(calls, contents):
        yield [_with_arguments(message, change) if "tool_calls" in message else message for message in form]


def _without_content(message: Message, empty: str | None) -> Message:
    """A message that consists of tool calls alone, with this content."""
    return {**message, "content": empty} if "tool_calls" in message and not message.get("content") else message


def _as_object(arguments: Any) -> Any:
    """Tool call arguments as JSON text (OpenAI's form) -> the object that most templates expect."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = []
    for call in message["tool_calls"]:
        holder = _function(call)
        changed = {**holder, "arguments": change(holder["arguments"])} if "arguments" in holder else holder
        calls.append(changed if holder is call else {**call, "function": changed})
    return {**message, "tool_calls": calls}


def _functions(message: Message) -> list[dict[str, Any]]:
    """Name and arguments of each tool call."""
    return [_function(call) for call in message.get("tool_calls", [])]


def _function(entry: dict[str, Any]) -> dict[str, Any]:
    """The name and the rest of a tool call or a tool's definition, which may stand under "function"."""
    inner = entry.get("function")
    return inner if isinstance(inner, dict) else entry


def _renders_properly(conversation: Conversation, awaits: bool) -> bool:
    """Whether the template rendered tool calls, and parts and JSON texts properly, rather than printing their Python or JSON
    repr."""
    messages = conversation.messages
    text = conversation.text(len(messages), awaits)
    if _turn_of_dropped_calls(conversation, awaits) is not None:
        return False
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            shown = (repr(content), json.dumps(content, ensure_ascii=False), json.dumps(content))
            if any(form in text for form in shown) or not all(part["text"].strip() in text for part in content):
                return False
        for function in _functions(message):
            arguments = function.get("arguments")
            if isinstance(arguments, str) and (
                json.dumps(arguments, ensure_ascii=False) in text or arguments not in text
            ):
                return False
    return True


def _without_none(
    conversation: Conversation, make: Callable[[list[Message]], Conversation], awaits: bool
) -> Conversation:
    """Pass empty contents instead of None if the template would print "None" (or JSON's null) for a turn without content."""
    messages, text = conversation.messages, conversation.text(len(conversation.messages), awaits)
    printed = [word for word in ("None", "null") if word in text]
    if not printed or all(message.get("content", "") is not None for message in messages):
        return conversation
    try:
        empty = make([{**m, "content": ""} if m.get("content", "") is None else m for m in messages])
    except ValueError:
        return conversation
    empty_text = empty.text(len(messages), awaits)
    fewer = any(text.count(word) > empty_text.count(word) for word in printed)
    return empty if fewer and _renders_properly(empty, awaits) else conversation


def _in_parts(
    messages: list[Message], make: Callable[[list[Message]], Conversation], awaits: bool
) -> Conversation | None:
    """Contents as lists of parts, the only form that templates of some vision-language models accept."""
    if not all(isinstance(message.get("content"), str) for message in messages):
        return None
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        conversation = make(parts)
    except ValueError:
        return None
    return conversation if _renders_properly(conversation, awaits) else None


def _dropped_message_error(conversation: Conversation, places: Sequence[str], awaits: bool) -> str | None:
    """Error text for the first message that the template drops, or whose tool calls it drops; None: there is none."""
    messages = conversation.messages
    text = conversation.text(len(messages), awaits)
    position = 0
    without_calls = _turn_of_dropped_calls(conversation, awaits)
    for turn, message in enumerate(messages):
        end = _content_end(text, message, position)
        if end is not None:
            position = end
        elif not _depends(conversation, turn, {**message, "content": "-"}, awaits):
            return (
                f"{conversation.label}: {places[turn]}: the chat template drops this message of the role "
                f"{message['role']!r}; use a role that it renders (assistant, user, mostly system), or another "
                "chat_template."
            )
        if turn == without_calls:
            return (
                f"{conversation.label}: {places[turn]}: the chat template does not render 'tool_calls'; use a "
                "chat_template that does, or put the calls into 'content'."
            )
    return None


def _turn_of_dropped_calls(conversation: Conversation, awaits: bool) -> int | None:
    """The first message whose tool calls are not in the text; None: there is none."""
    calling = [turn for turn, message in enumerate(conversation.messages) if _functions(message)]
    if not calling or _names_every_call(conversation, awaits):
        return None
    for turn in calling:
        without = {key: value for key, value in conversation.messages[turn].items() if key != "tool_calls"}
        if not _depends(conversation, turn, without, awaits):
            return turn
    return None


def _names_every_call(conversation: Conversation, awaits: bool) -> bool:
    """Whether the text has the names of all calls, beside those in the definitions of tools, of results and in what was said:
    sooner known than by rendering the conversation without a call."""
    text = conversation.text(len(conversation.messages), awaits)
    functions = [function for message in conversation.messages for function in _functions(message)]
    said = [f"{message.get('name', '')}\n{message_text(message)}" for message in conversation.messages]
    said += [str(function.get("arguments")) for function in functions]
    said.append(json.dumps(conversation.options.get("tools") or [], ensure_ascii=False))
    calls = Counter(str(function.get("name", "")) for function in functions)
    return all(text.count(name) >= count + sum(one.count(name) for one in said) for name, count in calls.items())


def _content_end(text: str, message: Message, start: int) -> int | None:
    """End of the message's content in the text, searched from `start` on; None: it does not occur verbatim."""
    content = message_text(message).strip()
    position = text.find(content, start)
    if position < 0 and message["role"] == "assistant":  # the template may drop its reasoning
        content = re.split(r"</\w+>|\[/\w+\]", content)[-1].strip()
        position = text.find(content, start) if content else -1
    return position + len(content) if position >= 0 else None


def _depends(conversation: Conversation, turn: int, other: Message, awaits: bool) -> bool:
    """Whether the rendered text changes if message `turn` is replaced by `other`."""
    messages = [*conversation.messages[:turn], other, *conversation.messages[turn + 1 :]]
    try:
        written = render_chat(conversation.tokenizer, messages, "", awaits, conversation.options)
    except ValueError:
        return True
    return written != conversation.text(len(messages), awaits)


def _writes_tools(conversation: Conversation, awaits: bool) -> bool:
    text = conversation.text(len(conversation.messages), awaits)
    tools = conversation.options["tools"]
    if all(str(function.get("name") or "\0") in text for function in map(_function, tools)):
        return True
    options = {key: value for key, value in conversation.options.items() if key != "tools"}
    try:
        return render_chat(conversation.tokenizer, conversation.messages, "", awaits, options) != text
    except ValueError:
        return True
