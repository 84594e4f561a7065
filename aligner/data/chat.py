"""Conversations as the model's chat template writes them: what it is given, and that it leaves out nothing."""

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
"""Keys of a message that say whether it is trained on: true or false, 1 or 0. No template sees them."""
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
"""What a row may give its chat template beside the messages."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys in which data sets keep what was thought before a turn's content."""
OWN = (
    "conversation", "messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of `apply_chat_template` that are no row's to set."""
NO_TOOLS = "rows with 'tools' that the chat template does not write"

Notes = Counter[str]
"""What a reader should know of how rows were tokenized -> how many."""


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that their template takes."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    options: dict[str, Any]
    """What else the template is given."""
    label: str
    """Where the row stands, for errors."""
    _written: dict[tuple[int, bool], str] = field(default_factory=dict)

    def text(self, turns: int, awaits: bool) -> str:
        """The first `turns` messages as the template writes them; `awaits`: up to where a model begins its answer."""
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
    """Messages that `checked_messages` passed, for the template.

    Where the template does not take their form (parts of a content, tool calls whose arguments are JSON text), they are
    given in the form that it takes.

    Args:
        places: where each message stands in the row, for the errors.
        options: see `template_options`.
        awaits: whether the whole conversation awaits an answer.

    Raises:
        ValueError: the template refuses the messages, or leaves one of them, or its tool calls, out.
    """
    cleaned = [_cleaned(message, f"{label}: {place}") for message, place in zip(messages, places, strict=True)]

    def made(form: list[Message]) -> Conversation:
        conversation = Conversation(tokenizer, form, dict(options), label)
        conversation.text(len(form), awaits)
        return conversation

    found: Conversation | None = _without_none(_fitting(cleaned, made, awaits), made, awaits)
    assert found is not None
    left_out = _left_out(found, places, awaits)
    if left_out:
        found = _in_parts(cleaned, made, awaits)
        if found is None or _left_out(found, places, awaits):
            raise ValueError(left_out)
    if notes is not None and options.get("tools") and not _writes_tools(found, awaits):
        notes[NO_TOOLS] += 1
    return found


def template_options(row: Mapping[str, Any], label: str, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a row and data.chat_template_kwargs give the template beside the messages.

    Args:
        row: 'tools', a list of definitions (JSON schemas) or JSON text of one, and 'chat_template_kwargs', further
            variables of the template; none, null and empty mean none.
        defaults: data.chat_template_kwargs; a row's own come first.

    Raises:
        ValueError: another type, or a variable that is not a row's to set.
    """
    given = _parsed(row.get("chat_template_kwargs"), f"{label}: 'chat_template_kwargs'")
    if given and not isinstance(given, dict):
        raise ValueError(
            f"{label}: 'chat_template_kwargs' must be an object such as {{\"enable_thinking\": false}}, not "
            f"{shortened(given)}."
        )
    options = {**(defaults or {}), **(given or {})}
    for name in OWN:
        if name in options:
            advice = "give it as a field of the row" if name == "tools" else "leave it out"
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
    """Raises ValueError for variables, set for all rows, that this tokenizer's template knows nothing of."""
    template = tokenizer.chat_template or ""
    source = "\n".join(template.values()) if isinstance(template, dict) else template
    for name in kwargs:
        if name in OWN:
            raise ValueError(f"{setting}{name} cannot be set; leave it out.")
        if name not in ("chat_template", "documents") and not re.search(rf"\b{re.escape(name)}\b", source):
            raise ValueError(
                f"{setting}{name} is no variable of the tokenizer's chat template; leave it out, or mend its name."
            )


def text_of(message: Message) -> str:
    """A message's content as one text; '' where it has none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _cleaned(message: Message, place: str) -> Message:
    """Without our switches and without keys that say nothing (data sets in columns have null in every other row)."""
    cleaned = {
        key: value for key, value in message.items() if key not in SWITCHES and (value is not None or key == "content")
    }
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


def _parsed(value: Any, what: str) -> Any:
    """JSON text -> what it says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{what} is no valid JSON: {error}.") from None


def _fitting(messages: list[Message], made: Callable[[list[Message]], Conversation], awaits: bool) -> Conversation:
    """The messages as they are if the template takes them so, or else in the first form that it takes."""
    found: Conversation | None = None
    refused: ValueError | None = None
    for form in _forms(messages):
        try:
            conversation = made(form)
        except ValueError as error:
            refused = refused or error
            continue
        if _takes(conversation.text(len(form), awaits), form):
            return conversation
        found = found or conversation
    if found is None:
        assert refused is not None
        raise refused
    return found


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    contents = [messages]
    if any(isinstance(message.get("content"), list) for message in messages):
        contents.append([{**m, "content": text_of(m)} if isinstance(m.get("content"), list) else m for m in messages])
    calls: list[Callable[[Any], Any]] = [lambda given: given]
    given = [function.get("arguments") for message in messages for function in _functions(message)]
    if any(isinstance(arguments, str) for arguments in given):
        calls.append(_as_object)
    if any(isinstance(arguments, dict) for arguments in given):
        calls.append(lambda given: json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given)
    for change, form in product(calls, contents):
        yield [_with_arguments(message, change) if "tool_calls" in message else message for message in form]


def _as_object(arguments: Any) -> Any:
    """OpenAI's JSON text of the arguments -> the object that most templates want."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function") if isinstance(call.get("function"), dict) else None
        holder = inner if inner is not None else call
        changed = {**holder, "arguments": change(holder["arguments"])} if "arguments" in holder else holder
        calls.append({**call, "function": changed} if inner is not None else changed)
    return {**message, "tool_calls": calls}


def _functions(message: Message) -> list[dict[str, Any]]:
    """Name and arguments of each tool call."""
    calls = message.get("tool_calls", [])
    return [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]


def _takes(text: str, messages: list[Message]) -> bool:
    """Whether the template wrote lists of parts and JSON texts for what they are, not as values to be shown."""
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


def _without_none(found: Conversation, made: Callable[[list[Message]], Conversation], awaits: bool) -> Conversation:
    """A template that does not think of a turn without content may write "None" there: then it gets an empty one."""
    messages, written = found.messages, found.text(len(found.messages), awaits)
    if "None" not in written or all(message.get("content", "") is not None for message in messages):
        return found
    empty = made([{**m, "content": ""} if m.get("content", "") is None else m for m in messages])
    text = empty.text(len(messages), awaits)
    more = written.count("None") - text.count("None")
    return empty if more > 0 and len(written) - len(text) == more * len("None") else found


def _in_parts(
    messages: list[Message], made: Callable[[list[Message]], Conversation], awaits: bool
) -> Conversation | None:
    """Contents as lists of parts: all that some templates of models take which see pictures too."""
    if not all(isinstance(message.get("content"), str) for message in messages):
        return None
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        found = made(parts)
    except ValueError:
        return None
    return found if _takes(found.text(len(parts), awaits), parts) else None


def _left_out(conversation: Conversation, places: Sequence[str], awaits: bool) -> str | None:
    """What to say of the first message that the template leaves out, or whose tool calls it does."""
    messages = conversation.messages
    text = conversation.text(len(messages), awaits)
    done = 0
    for turn, message in enumerate(messages):
        at = _found(text, message, done)
        if at is not None:
            done = at
        elif not _depends(conversation, turn, {**message, "content": "-"}, awaits):
            return (
                f"{conversation.label}: {places[turn]}: the chat template leaves out this message of the role "
                f"{message['role']!r}; use a role that it knows (assistant, user, mostly system), or another "
                "chat_template."
            )
        names = [str(function.get("name", "")) for function in _functions(message)]
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        without["content"] = without.get("content") or ""
        if names and not all(name in text for name in names) and not _depends(conversation, turn, without, awaits):
            return (
                f"{conversation.label}: {places[turn]}: the chat template does not write 'tool_calls'; use a "
                "chat_template that does, or write the calls into 'content'."
            )
    return None


def _found(text: str, message: Message, begin: int) -> int | None:
    """Where the message's content ends in the text, from `begin` on; None: it is not there as it is."""
    content = text_of(message).strip()
    place = text.find(content, begin)
    if place < 0 and message["role"] == "assistant":  # its reasoning may be left out
        content = re.split(r"</\w+>|\[/\w+\]", content)[-1].strip()
        place = text.find(content, begin) if content else -1
    return place + len(content) if place >= 0 else None


def _depends(conversation: Conversation, turn: int, other: Message, awaits: bool) -> bool:
    """Whether the template writes something else with another message there."""
    messages = [*conversation.messages[:turn], other, *conversation.messages[turn + 1 :]]
    try:
        written = render_chat(conversation.tokenizer, messages, "", awaits, conversation.options)
    except ValueError:
        return True
    return written != conversation.text(len(messages), awaits)


def _writes_tools(conversation: Conversation, awaits: bool) -> bool:
    text = conversation.text(len(conversation.messages), awaits)
    tools = conversation.options["tools"]
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    if all(str(function.get("name") or "\0") in text for function in functions):
        return True
    options = {key: value for key, value in conversation.options.items() if key != "tools"}
    try:
        return render_chat(conversation.tokenizer, conversation.messages, "", awaits, options) != text
    except ValueError:
        return True
