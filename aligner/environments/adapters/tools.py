"""Environments of kind `tools`: functions, and classes as TRL's `environment_factory` takes them.

A class is made for each episode; `reset(**row)` may return an observation, which is appended to the prompt's last message;
every other public method but `get_reward()`, the final reward, is a tool. Functions are tools as they are; a file or a module
stands for its public functions. All may be async. A tool's JSON schema comes from its signature and its docstring in Google's
style, and equals that of transformers' `get_json_schema`; one with an attribute `json_schema` brings its own.

A turn without a tool call ends the episode. What a tool returns is its message: text as it is, other JSON values encoded. What it
raises is told to the policy as {"error": ...} and counted (`tool_errors`), as arguments that do not fit are.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

BUILT_IN = {"interpreter": "interpreter.py:Interpreter", "http": "http_tool.py:HttpTool"}
"""Tools that stand beside this file."""
NO_TOOLS = ("reset", "get_reward")
JSON_TYPES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
SECTION = re.compile(r"^[ \t]*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


class SchemaError(Exception):
    """A function whose signature and docstring make no schema."""


def make(host: Host) -> Callable[[], Tools]:
    """See the package."""
    sources = [("environment.target", host.target, host.options)]
    for name in host.settings["tools"]:
        sources.append(("environment.tools", name, host.settings["tool_options"].get(name, {})))
    parts = [_part(host, *source) for source in sources]
    schemas: dict[str, Any] = {}
    for (setting, target, _), (_, functions) in zip(sources, parts):  # noqa: B905 (Python 3.10)
        for name, function in functions.items():
            if name in schemas:
                raise host.Unusable(f"{setting}={target}: there are two tools named {name}; rename one")
            try:
                schemas[name] = getattr(function, "json_schema", None) or json_schema(function)
            except SchemaError as error:
                raise host.Unusable(f"{setting}={target}: the tool {name} {error}") from None
    if not schemas:
        raise host.Unusable(f"environment.target={host.target} has no tool: no public function or method")
    return lambda: Tools(host, [make_one for make_one, _ in parts], list(schemas.values()))


def _part(host: Host, setting: str, target: str, options: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(what makes an object or a dict of functions for an episode, the functions by name)."""
    if target in BUILT_IN:
        target = os.path.join(host.folder, BUILT_IN[target])
    loaded = host.load(target, setting)
    if inspect.isclass(loaded):
        try:
            inspect.signature(loaded).bind(**options)
        except TypeError as error:
            place = "environment.options" if setting == "environment.target" else "environment.tool_options"
            raise host.Unusable(f"{place} do not fit {target}: {error}") from None
        ready = getattr(loaded, "_problem", None)  # of our own tools: why they cannot work here
        problem = ready(**options) if ready else None
        if problem:
            raise host.Unusable(f"{setting}={target}: {problem}")
        if hasattr(loaded, "_tools_of"):
            return (lambda: loaded(**options)), loaded._tools_of(**options)
        return (lambda: loaded(**options)), public_methods(loaded)
    if options:
        raise host.Unusable(f"{setting}={target} is no class and takes no options; remove them")
    if inspect.ismodule(loaded):
        functions = {
            name: value
            for name, value in vars(loaded).items()
            if inspect.isfunction(value) and value.__module__ == loaded.__name__ and not name.startswith("_")
        }
    elif callable(loaded):
        functions = {getattr(loaded, "__name__", target.rpartition(":")[2]): loaded}
    else:
        raise host.Unusable(f"{setting}={target} is a {type(loaded).__name__}, neither a class nor a function")
    return (lambda: functions), functions


def public_methods(kind: type) -> dict[str, Any]:
    """The tools of a class by name, as TRL finds them."""
    members = inspect.getmembers(kind, predicate=inspect.isfunction)
    return {name: function for name, function in members if name not in NO_TOOLS and not name.startswith("_")}


class Tools:
    """One episode."""

    def __init__(self, host: Host, makers: list[Callable[[], Any]], schemas: list[dict[str, Any]]) -> None:
        self._host, self._schemas = host, schemas
        made = [host.resolve(make_one()) for make_one in makers]
        self._objects = [one for one in made if not isinstance(one, dict)]
        self._tools: dict[str, Callable[..., Any]] = {}
        for one in made:
            names = one if isinstance(one, dict) else getattr(one, "_tool_names", None) or public_methods(type(one))
            self._tools.update(names if isinstance(one, dict) else {name: getattr(one, name) for name in names})

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        observations = []
        for one in self._objects:
            if callable(getattr(one, "reset", None)):
                observations.append(self._host.resolve(one.reset(**row)))
        text = "".join(self._host.text_of(one, "reset") for one in observations if one is not None)
        prompt = conversation_of(row)
        turn: dict[str, Any] = {"messages": [], "tools": self._schemas}
        if text and prompt:
            turn["messages"] = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + text}]
            turn["replaces"] = True
        elif text:
            turn["messages"] = [{"role": "user", "content": text}]
        return turn

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        messages, errors = [], 0
        for call in tool_calls:
            content, failed = self._result(call)
            errors += failed
            message = {"role": "tool", "name": str(call.get("name", "")), "content": content}
            if call.get("id"):
                message["tool_call_id"] = str(call["id"])
            messages.append(message)
        metrics = {"tool_calls": len(tool_calls), "tool_errors": errors}
        return {"messages": messages, "done": not tool_calls, "metrics": metrics}

    def finish(self) -> dict[str, Any]:
        rewards = [self._host.resolve(one.get_reward()) for one in self._objects if hasattr(one, "get_reward")]
        given = [reward for reward in rewards if reward is not None]
        return {"reward": sum(given[1:], given[0]) if given else None}

    def close(self) -> None:
        pass

    def _result(self, call: dict[str, Any]) -> tuple[str, bool]:
        """(the message of a call's result, whether it is an error)."""
        name, arguments = call.get("name"), call.get("arguments", {})
        try:
            if name not in self._tools:
                raise ValueError(f"there is no tool {name}; there are {', '.join(self._tools)}")
            if not isinstance(arguments, dict):
                raise ValueError(f"the arguments of {name} are not a JSON object")
            value = self._host.resolve(self._tools[name](**arguments))
        except MemoryError:
            raise
        except Exception as error:
            return json.dumps({"error": str(error) or type(error).__name__}, ensure_ascii=False), True
        return self._host.text_of(value, f"the tool {name}"), False


def conversation_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt of a row as messages; none where it has none."""
    prompt = row.get("messages") or row.get("prompt") or []
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]


def json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and its docstring; as transformers' `get_json_schema` makes it.

    Raises:
        SchemaError: it has no docstring, or an argument without a type hint or a description.
    """
    doc = inspect.getdoc(function)
    if not doc:
        raise SchemaError("has no docstring, which tells the policy what it does")
    description, described, returns = _sections(doc)
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls") and parameter.annotation is parameter.empty:
            continue
        if name not in hints:
            raise SchemaError(f"has no type hint for its argument {name}")
        if name not in described:
            raise SchemaError(
                f"has no description of its argument {name} in its docstring ('Args:', then '    {name}: ...')"
            )
        properties[name] = _described(type_schema(hints[name]), described[name])
        if parameter.default is parameter.empty:
            required.append(name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    schema: dict[str, Any] = {"name": function.__name__, "description": description, "parameters": parameters}
    if "return" in hints:
        schema["return"] = type_schema(hints["return"])
        if returns is not None:
            schema["return"]["description"] = returns
    return {"type": "function", "function": schema}


def _described(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """A type with its description, whose `(choices: [...])` at the end become an enum."""
    choices = CHOICES.search(text)
    if choices:
        values = json.loads(choices.group(1))
        schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
        text = text[: choices.start()].strip()
    return {**schema, "description": text}


def type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint. Raises SchemaError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is None:
        return {"type": JSON_TYPES.get(hint, "object")}
    if origin is typing.Union or origin is getattr(types, "UnionType", None):
        return _union_schema([type_schema(one) for one in arguments if one is not type(None)], type(None) in arguments)
    if origin is typing.Literal:
        kinds = list(dict.fromkeys(JSON_TYPES[type(one)] for one in arguments))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": type_schema(arguments[0])} if arguments else {"type": "array"}
    if origin is tuple:
        if len(arguments) == 1 or ... in arguments:
            raise SchemaError(f"has the type {hint}, which is no JSON; use list[...]")
        return (
            {"type": "array", "prefixItems": [type_schema(one) for one in arguments]}
            if arguments
            else {"type": "array"}
        )
    if origin is dict:
        values = {"additionalProperties": type_schema(arguments[1])} if len(arguments) == 2 else {}
        return {"type": "object", **values}
    raise SchemaError(f"has the type {hint}, which is no JSON")


def _union_schema(options: list[dict[str, Any]], nullable: bool) -> dict[str, Any]:
    if len(options) == 1:
        schema = options[0]
    elif all(set(option) == {"type"} and isinstance(option["type"], str) for option in options):
        names = sorted({option["type"] for option in options})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": options}
    return {**schema, "nullable": True} if nullable else schema


def _sections(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(description, descriptions of arguments, what it returns) of a docstring in Google's style."""
    starts = list(SECTION.finditer(doc))
    ends = [start.start() for start in starts[1:]] + [len(doc)]
    bodies: dict[str, str] = {}
    for start, end in zip(starts, ends):  # noqa: B905
        bodies.setdefault(start.group(1), doc[start.end() : end])
    description = doc[: starts[0].start()] if starts else doc
    returns = bodies.get("Returns")
    return description.strip(), _arguments(bodies.get("Args", "")), returns.strip() if returns is not None else None


def _arguments(body: str) -> dict[str, str]:
    """Argument -> description, the lines of each joined."""
    described: dict[str, list[str]] = {}
    for line in filter(None, (line.strip() for line in body.splitlines())):
        start = re.match(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if start:
            described[start.group(1)] = [start.group(2)]
        elif described:
            described[list(described)[-1]].append(line)
    return {name: " ".join(filter(None, lines)).strip() for name, lines in described.items()}
