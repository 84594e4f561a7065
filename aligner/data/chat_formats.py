"""Conversations as ShareGPT, Anthropic's and OpenAI's interfaces write them -> messages of chat templates."""

from __future__ import annotations

from typing import Any

from aligner.data.checked_columns import FormatRow, Row
from aligner.data.json_text import parsed
from aligner.data.tokenizer import checked_messages, shortened

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
"""ShareGPT's 'from', in any case -> role; "function_call" is an assistant turn whose value is the call, or a list of them, as
JSON."""


def sharegpt(row: FormatRow, chat: bool) -> Row:
    """'conversations' of 'from' and 'value' (or of 'role' and 'content'); 'system' and 'tools' may stand beside them."""
    messages: list[Row] = []
    for number, value in enumerate(row.list("conversations")):
        turn = row.within(value, f"conversations[{number}]")
        speaker, said = ("role", "content") if "role" in turn.row and "from" not in turn.row else ("from", "value")
        role = SPEAKERS.get(turn.text(speaker).lower())
        if role is None:
            turn.fail(f"{speaker!r} is {turn.row[speaker]!r}, which is none of {', '.join(SPEAKERS)}")
        weight = {key: turn.row[key] for key in ("weight", "train") if turn.row.get(key) is not None}
        if role == "function_call":
            calls = [_call(call) for call in _json_calls(turn, said)]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **weight})
        else:
            messages.append({"role": role, "content": turn.text(said), **weight})
    system = row.optional_text("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {**row.rest("conversations", "system"), "messages": messages}


def anthropic(row: FormatRow, chat: bool) -> Row:
    """Contents are text or blocks: text, thinking, tool_use, tool_result; 'tools' have an 'input_schema'."""
    messages: list[Row] = []
    system = _blocks(row.row.get("system"))
    if system:
        parts = [{"type": "text", "text": system}] if isinstance(system, str) else system
        if not isinstance(parts, list):
            row.fail(f"column 'system' must be text or a list of text blocks, not {shortened(system)}")
        messages.append({"role": "system", "content": _texts(row, parts, "system")})
    for number, value in enumerate(row.list("messages")):
        messages += _anthropic_turn(row.within(value, f"messages[{number}]"))
    given = row.list("tools") if row.row.get("tools") else []
    tools = [_anthropic_tool(row.within(tool, f"tools[{n}]")) for n, tool in enumerate(given)]
    fields = row.rest("system", "messages", "tools")
    return {**fields, "messages": messages, **({"tools": tools} if tools else {})}


def openai(row: FormatRow, chat: bool) -> Row:
    """'messages' with 'tool_calls' and 'tools' (or the older 'function_call' and 'functions'), or a pair of outputs."""
    if "preferred_output" not in row.row:
        fields = row.rest("messages", "tools", "functions", "parallel_tool_calls")
        return {**fields, "messages": _openai_messages(row, row.list("messages"), "messages"), **_openai_tools(row)}
    given = row.within(row.object("input"), "input")
    prompt = _openai_messages(given, given.list("messages"), "messages")
    sides = {
        ours: _openai_messages(row, row.list(theirs), theirs)
        for ours, theirs in (("chosen", "preferred_output"), ("rejected", "non_preferred_output"))
    }
    fields = row.rest("input", "preferred_output", "non_preferred_output")
    return {**fields, "prompt": prompt, **sides, **_openai_tools(given)}


def _anthropic_turn(turn: FormatRow) -> list[Row]:
    """One turn: results of tools become turns of their own, before what the user says."""
    role, content = turn.text("role"), _blocks(turn.row.get("content"))
    if role not in ("user", "assistant"):
        turn.fail(f"'role' is {role!r}, which is none of user, assistant (a system prompt is the column 'system')")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts: list[Row] = []
    thoughts: list[str] = []
    calls: list[Row] = []
    results: list[Row] = []
    for number, value in enumerate(turn.list("content")):
        block = turn.within(value, f"content[{number}]")
        kind = block.text("type")
        if kind == "text":
            texts.append(value)
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.text("thinking"))
        elif kind == "tool_use" and role == "assistant":
            call = {"name": block.text("name"), "arguments": block.object("input")}
            calls.append({**({"id": block.row["id"]} if block.row.get("id") else {}), **_call(call)})
        elif kind == "tool_result" and role == "user":
            results.append(_tool_result(block))
        else:
            block.fail(f"'type' is {kind!r}, which is no block of text in a turn of the {role}")
    own: list[Row] = []
    if texts or calls or thoughts:
        own = [{"role": role, "content": _texts(turn, texts, "content")}]
        own[0] |= ({"tool_calls": calls} if calls else {}) | (
            {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        )
    return [*results, *own]


def _blocks(content: Any) -> Any:
    """The blocks in JSON text of a list of them; any other content as it is, also text that is another list."""
    held = parsed(content)
    is_blocks = isinstance(held, list) and held and all(isinstance(block, dict) and "type" in block for block in held)
    return held if is_blocks else content


def _tool_result(block: FormatRow) -> Row:
    content = block.row.get("content")
    text = content if isinstance(content, str) else _texts(block, content or [], "content")
    call = {"tool_call_id": block.row["tool_use_id"]} if block.row.get("tool_use_id") else {}
    return {"role": "tool", **call, "content": text}


def _anthropic_tool(tool: FormatRow) -> Row:
    function = {
        "name": tool.text("name"),
        "description": tool.optional_text("description"),
        "parameters": tool.object("input_schema"),
    }
    return {"type": "function", "function": function}


def _texts(row: FormatRow, blocks: list[Any], place: str) -> str:
    texts = []
    for number, value in enumerate(blocks):
        block = row.within(value, f"{place}[{number}]")
        if block.row.get("type") != "text":
            block.fail(f"'type' is {block.row.get('type')!r}, and only text can be trained on")
        texts.append(block.text("text"))
    return "\n".join(texts)


def _openai_messages(row: FormatRow, values: list[Any], column: str) -> list[Row]:
    messages: list[Row] = []
    for number, value in enumerate(values):
        message = dict(row.within(value, f"{column}[{number}]").row)
        if message.get("role") == "developer":
            message["role"] = "system"
        if message.get("role") == "function":
            message["role"] = "tool"
        call = message.pop("function_call", None)
        if call is not None:
            message["tool_calls"] = [_call(row.within(call, f"{column}[{number}].function_call").row)]
        if message.get("tool_calls"):
            message["tool_calls"] = _openai_calls(row, message["tool_calls"], f"{column}[{number}]")
        messages.append(message)
    return checked_messages(messages, row.label, column)


def _openai_calls(row: FormatRow, value: Any, place: str) -> list[Row]:
    """Tool calls, whose arguments are an object or its JSON text."""
    calls = parsed(value)
    if not isinstance(calls, list):
        row.fail(f"{place}: 'tool_calls' must be a list, not {shortened(value)}")
    checked: list[Row] = []
    for number, entry in enumerate(calls):
        call = row.within(entry, f"{place}.tool_calls[{number}]")
        function = call.within(call.row["function"], "function") if "function" in call.row else call
        function.text("name")
        if function.row.get("arguments") not in (None, ""):
            function.object("arguments")
        checked.append(call.row if function is call else {**call.row, "function": function.row})
    return checked


def _openai_tools(row: FormatRow) -> Row:
    tools = row.row.get("tools")
    if not tools and row.row.get("functions"):
        functions = [row.within(entry, f"functions[{n}]").row for n, entry in enumerate(row.list("functions"))]
        tools = [{"type": "function", "function": function} for function in functions]
    return {"tools": tools} if tools else {}


def _call(call: Row) -> Row:
    """{'name', 'arguments'} as one entry of 'tool_calls'."""
    return {"type": "function", "function": {"name": call.get("name"), "arguments": call.get("arguments", {})}}


def _json_calls(turn: FormatRow, column: str) -> list[Row]:
    """The calls in the JSON text of one, or of a list of them."""
    value = parsed(turn.text(column))
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        text = shortened(turn.row[column])
        turn.fail(f"{column!r} of a function_call must be JSON with 'name' and 'arguments', not {text}")
    return calls
