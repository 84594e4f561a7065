"""Tool calls in a sampled turn, by the formats of model families: text -> content, reasoning, calls, or what is wrong with them.

The formats are public conventions of the models' chat templates. A turn in which any call is malformed calls nothing: its error
is for the model, as a message of the role 'tool'.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aligner.environments.reasoning import split_reasoning

if TYPE_CHECKING:
    from aligner.data.tokenizer import Message

Tools = Sequence[Mapping[str, Any]]
"""Definitions of the tools (JSON schemas), which say the types of arguments that a format writes as text."""
VLLM = "vllm:"
"""Prefix of environment.tool_parser for one of vLLM's own parsers, such as "vllm:kimi_k2"."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ParsedTurn:
    """A sampled turn, read."""

    content: str
    """Its text without reasoning and calls."""
    calls: tuple[ToolCall, ...] = ()
    error: str | None = None
    """What is wrong with its calls, for the model; None: nothing. There are no `calls` then."""
    reasoning: str | None = None
    """What stands apart from the content as reasoning, where the chat template takes it as a field of its own (gpt-oss)."""


MAX_DEPTH = 64
"""Levels of objects and arrays in the arguments of a call."""
TOO_LARGE = "is nested too deeply, or has too large a number"


class MalformedError(ValueError):
    """A tool call that cannot be read; the text is for the model."""


ToolParser = Callable[[str, Tools], ParsedTurn]
"""(the turn's text with its special tokens but without the stop token, the tools) -> the turn, read. Never raises."""


def no_tools(text: str, tools: Tools = ()) -> ParsedTurn:
    """A turn of an environment without tools: all of it is content."""
    return ParsedTurn(text)


def hermes(text: str, tools: Tools = ()) -> ParsedTurn:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3. A last call may lack its end."""
    thought, rest = split_reasoning(text)
    blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", rest, re.DOTALL)
    return _read(text, thought, rest.partition("<tool_call>")[0], blocks, _json_call)


def qwen3_xml(text: str, tools: Tools = ()) -> ParsedTurn:
    """<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>: Qwen3-Coder, Qwen3.5, Nemotron 3."""
    thought, rest = split_reasoning(text)
    opener = "<tool_call>" if "<tool_call>" in rest else "<function="
    blocks = re.findall(r"<function=(.*?)(?:</function>|\Z)", rest, re.DOTALL)
    if opener in rest and not blocks:
        blocks = [""]
    return _read(text, thought, rest.partition(opener)[0], blocks, partial(_xml_call, tools=tools))


def glm(text: str, tools: Tools = ()) -> ParsedTurn:
    """<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>: GLM-4.5 and later."""
    thought, rest = split_reasoning(text)
    blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", rest, re.DOTALL)
    return _read(text, thought, rest.partition("<tool_call>")[0], blocks, partial(_glm_call, tools=tools))


def llama3_json(text: str, tools: Tools = ()) -> ParsedTurn:
    """{"name": ..., "parameters": {...}}, after <|python_tag|> or not, several separated by ";": Llama 3.1 and later.
    Other JSON is content."""
    thought, rest = split_reasoning(text)
    begins = re.search(r'<\|python_tag\|>|\{\s*"(name|parameters|arguments)"', rest)
    if begins is None:
        return ParsedTurn(rest)
    body = rest[begins.start() :].removeprefix("<|python_tag|>").strip()
    return _read(text, thought, rest[: begins.start()], [body], _json_sequence)


def mistral(text: str, tools: Tools = ()) -> ParsedTurn:
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]NAME{...} for each call (v11 and later): Mistral."""
    thought, rest = split_reasoning(text)
    content, *blocks = rest.split("[TOOL_CALLS]")
    return _read(text, thought, content, blocks, _mistral_calls)


def pythonic(text: str, tools: Tools = ()) -> ParsedTurn:
    """[name(key=value, ...), ...] in Python's syntax: Llama 3.2, Llama 4, Olmo 3, LFM2."""
    thought, rest = split_reasoning(text)
    body = (
        rest.strip()
        .removeprefix("<|python_start|>")
        .removeprefix("<|tool_call_start|>")
        .removeprefix("<function_calls>")
    )
    for closing in ("<|python_end|>", "<|tool_call_end|>", "</function_calls>"):
        body = body.removesuffix(closing)
    if not re.match(r"\[\s*[A-Za-z_][\w.]*\(", body.strip()):
        return ParsedTurn(rest)
    return _read(text, thought, "", [body.strip()], _python_calls)


def harmony(text: str, tools: Tools = ()) -> ParsedTurn:
    """Channels of gpt-oss: analysis (reasoning), commentary to=functions.NAME (calls), final (content)."""
    reasoning, content, calls = [], [], []
    for header, channel, body in _harmony_messages(text):
        recipient = re.search(r"to=(?:functions\.)?([\w.-]+)", f"{header} {channel}")
        if recipient:
            calls.append((recipient[1], body))
        elif channel.strip().startswith("analysis"):
            reasoning.append(body)
        else:
            content.append(body)
    if not (reasoning or content or calls):
        return ParsedTurn(text)
    if calls:  # what is said before a call is reasoning to the template
        reasoning, content = [*reasoning, *content], []
    return _read(text, "\n".join(reasoning), "".join(content), calls, _named_call, apart=True)


def _harmony_messages(text: str) -> Iterator[tuple[str, str, str]]:
    """(header, channel, body) of each message; in time linear in the text."""
    place = 0
    while (opener := text.find("<|message|>", place)) >= 0:
        head, body = text[place:opener], opener + len("<|message|>")
        head = head.rpartition("<|constrain|>")[0] or head
        header, has_channel, channel = head.rpartition("<|channel|>")
        end = re.compile(r"<\|(end|call|return)\|>").search(text, body)
        place = end.start() if end else len(text)
        yield (header if has_channel else head).rpartition("<")[2], channel if has_channel else "", text[body:place]


PARSERS: dict[str, ToolParser] = {
    "hermes": hermes,
    "qwen3_xml": qwen3_xml,
    "glm": glm,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "pythonic": pythonic,
    "harmony": harmony,
}
SIGNS = (
    ("harmony", ("<|channel|>", "<|call|>")),
    ("qwen3_xml", ("<tool_call>", "<function=")),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<function_calls>",)),
    ("llama3_json", ("<|start_header_id|>", "parameters")),
)
"""(format, what a chat template has that writes calls so), the more special first."""


def check_name(name: str) -> None:
    """Raises ValueError for a name that environment.tool_parser cannot have."""
    if name != "auto" and name not in PARSERS and not name.startswith(VLLM):
        raise ValueError(
            f"environment.tool_parser={name} is none of auto, {', '.join(PARSERS)}, or {VLLM}NAME for one of vLLM's own."
        )


def turn_of(text: str, content: str, calls: Sequence[tuple[str, str]]) -> ParsedTurn:
    """A turn with calls whose arguments are JSON text.

    Args:
        calls: (name, arguments) of each.
    """
    return _read(text, None, content, calls, _named_call)


def _named_call(call: tuple[str, str]) -> list[ToolCall]:
    name, arguments = call
    return [ToolCall(name, _arguments(_json(arguments)))]


def format_of(template: str) -> str:
    """The format in which a chat template writes tool calls.

    Raises:
        ValueError: none that is known.
    """
    for name, signs in SIGNS:
        if all(sign in template for sign in signs):
            return name
    raise ValueError(
        "environment.tool_parser=auto: the chat template writes tool calls in no format that is known; set it to "
        f"{', '.join(PARSERS)}, or to one of vLLM's own: {VLLM}NAME (such as {VLLM}kimi_k2)."
    )


def call_message(parsed: ParsedTurn, text: str, ids: Sequence[str]) -> Message:
    """The assistant's message of a turn, for the chat template: what it says as it was sampled, calls apart.

    Args:
        text: the turn's text.
        ids: an id for each call.
    """
    message: Message = {"role": "assistant", "content": text}
    if parsed.reasoning is not None:
        message["content"] = parsed.content
        message |= {"thinking": parsed.reasoning} if parsed.reasoning else {}
    elif parsed.calls:
        message["content"] = (split_reasoning(text)[0] + parsed.content).strip("\n")
    if parsed.calls:
        message["tool_calls"] = [
            {"type": "function", "id": name, "function": {"name": call.name, "arguments": call.arguments}}
            for name, call in zip(ids, parsed.calls, strict=True)
        ]
    return message


Block = TypeVar("Block")


def _read(
    text: str,
    thought: str | None,
    content: str,
    blocks: Sequence[Block],
    read: Callable[[Block], Sequence[ToolCall]],
    apart: bool = False,
) -> ParsedTurn:
    """The turn with the calls of its blocks, or with the error of the first that cannot be read.

    Args:
        apart: reasoning is a field of its own.
    """
    calls: list[ToolCall] = []
    reasoning = thought if apart else None
    for number, block in enumerate(blocks, start=1):
        try:
            made = read(block)
            for call in made:
                _check_json(call)
            calls += made
        except MalformedError as error:
            return ParsedTurn(content if apart else text, (), f"tool call {number} {error}", reasoning)
        except (ValueError, RecursionError):  # whatever a model writes is no reason to end the job
            return ParsedTurn(content if apart else text, (), f"tool call {number} {TOO_LARGE}", reasoning)
    return ParsedTurn(content.strip() if calls else content, tuple(calls), None, reasoning)


def _check_json(call: ToolCall) -> None:
    """Raises MalformedError for what JSON and UTF-8 do not have (NaN, infinity, halves of a surrogate pair), and for arguments
    nested deeper than MAX_DEPTH, which templates and environments could not write again."""
    try:
        json.dumps([call.name, call.arguments], allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise MalformedError("must have finite numbers and valid text as arguments") from None
    level: list[Any] = [call.arguments]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise MalformedError(TOO_LARGE)


def _json(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"is not valid JSON: {error}") from None


def _json_call(text: str) -> list[ToolCall]:
    return [_object_call(_json(text))]


def _json_sequence(text: str) -> list[ToolCall]:
    """Calls one after the other, separated by ";" or by whitespace."""
    calls, decoder = [], json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"is not valid JSON: {error}") from None
        calls.append(_object_call(value))
        text = text[end:].lstrip(" \t\r\n;,")
    return calls


def _object_call(value: Any) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise MalformedError('must be an object with "name" and "arguments"')
    key = next((key for key in ("arguments", "parameters") if key in value), None)
    if key is None:
        raise MalformedError(f'of {value["name"]!r} has no "arguments"')
    return ToolCall(value["name"], _arguments(value[key]))


def _arguments(value: Any) -> dict[str, Any]:
    """An object, or its JSON text, as some models write it."""
    if isinstance(value, str):
        value = _json(value)
    if not isinstance(value, dict):
        raise MalformedError(f"must have an object as arguments, not {json.dumps(value)[:60]}")
    return value


def _xml_call(block: str, tools: Tools) -> list[ToolCall]:
    name, closed, body = block.partition(">")
    if not closed or not name.strip():
        raise MalformedError("must be <function=NAME> with <parameter=KEY>VALUE</parameter> inside")
    pairs = re.findall(r"<parameter=([^<>]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", body, re.DOTALL)
    values = {key.strip(): _unwrapped(value) for key, value in pairs}
    return [ToolCall(name.strip(), _typed(name.strip(), values, tools))]


def _unwrapped(value: str) -> str:
    """Without the line breaks that the format puts around a value."""
    return value.removeprefix("\n").removesuffix("\n")


def _glm_call(block: str, tools: Tools) -> list[ToolCall]:
    name = block.partition("<arg_key>")[0].strip()
    if not name or "\n" in name:
        raise MalformedError("must be NAME with <arg_key>KEY</arg_key><arg_value>VALUE</arg_value> after it")
    pairs = re.findall(
        r"<arg_key>((?:(?!<arg_key>).)*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", block, re.DOTALL
    )
    return [ToolCall(name, _typed(name, {key.strip(): value for key, value in pairs}, tools))]


def _typed(name: str, arguments: Mapping[str, str], tools: Tools) -> dict[str, Any]:
    """Arguments that were written as text, by the types of the tool's schema; text where it names none or does not fit."""
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools]
    schema: Any = next((one.get("parameters") for one in functions if one.get("name") == name), None) or {}
    properties = schema.get("properties") or {}
    return {key: _typed_value(value, properties.get(key) or {}) for key, value in arguments.items()}


def _typed_value(value: str, schema: Mapping[str, Any]) -> Any:
    kind = schema.get("type")
    options = schema.get("anyOf") or schema.get("oneOf") or []
    kinds = {
        *(kind if isinstance(kind, list) else [kind]),
        *(one.get("type") for one in options if isinstance(one, Mapping)),
    }
    kinds.discard(None)
    if not kinds or kinds == {"string"}:
        return value
    try:
        read = json.loads(value.strip())
    except ValueError:
        read = {"True": True, "False": False, "None": None}.get(value.strip(), value)
    if "string" in kinds and not isinstance(read, (dict, list)) and not (kinds & _kinds(read)):
        return value
    return read


def _kinds(value: Any) -> set[str]:
    """Names of JSON types that a value has."""
    if isinstance(value, bool):
        return {"boolean"}
    if value is None:
        return {"null"}
    return {"integer", "number"} if isinstance(value, int) else {"number"} if isinstance(value, float) else set()


def _mistral_calls(block: str) -> list[ToolCall]:
    body = block.strip()
    if body.startswith("["):
        return [_object_call(value) for value in _json(body)]
    if body.startswith("{"):
        return [_object_call(_json(body))]
    name, brace, rest = body.partition("{")
    name = name.split("[CALL_ID]")[0].removesuffix("[ARGS]").strip()
    if not name or not brace:
        raise MalformedError('must be [{"name": ..., "arguments": {...}}], or a name with its arguments {...}')
    return [ToolCall(name, _arguments(_json(brace + rest)))]


def _python_calls(body: str) -> list[ToolCall]:
    try:
        tree = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedError(f"is not valid Python: {error}") from None
    if not isinstance(tree, ast.List):
        raise MalformedError("must be a list of calls: [name(key=value)]")
    return [_python_call(node) for node in tree.elts]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
        raise MalformedError("must be a call: name(key=value)")
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise MalformedError(f"of {name!r} must name its arguments: {name}(key=value)")
    return ToolCall(name, {str(keyword.arg): _python_value(keyword.value) for keyword in node.keywords})


def _python_value(node: ast.expr) -> Any:
    """A literal; also JSON's true, false and null."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [_python_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise MalformedError("must have texts as keys of its objects")
        return dict(zip(keys, map(_python_value, node.values), strict=True))
    try:
        value = ast.literal_eval(node)
        json.dumps(value)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        raise MalformedError(f"must have literals as arguments, not {ast.unparse(node)[:60]}") from None
    return value
