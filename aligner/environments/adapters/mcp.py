"""Environments of kind `mcp`: the tools of an MCP server (package mcp), by its URL or the command that starts it.

Each episode has a session of its own, and with a command a server of its own. environment.options: `env` and `cwd` of the command;
`tools`: names of those that the policy gets (all). A turn without a tool call ends the episode; there is no reward of the server:
use a rule on the response (`reward.rule`). What a tool fails with is told to the policy and counted.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

LOST = (-32000, -32001)
"""The package's codes of a connection that was closed, and of a request without an answer in time."""


def make(host: Host) -> Callable[[], McpSession]:
    """See the package."""
    mcp = host.load("mcp", "environment.kind=mcp; environment.target")
    known = {"env", "cwd", "tools"}
    if set(host.options) - known:
        raise host.Unusable(
            f"environment.options of kind=mcp are {', '.join(sorted(known))}, not {sorted(set(host.options) - known)}"
        )
    if not hasattr(mcp, "Client"):
        raise host.Unusable("environment.kind=mcp needs the package mcp 2.0 or newer in environment.python")
    if host.target.startswith(("http://", "https://")):
        return lambda: McpSession(host, mcp.MCPError, lambda: mcp.Client(host.target))
    words = shlex.split(host.target)
    places = {name: host.options[name] for name in ("env", "cwd") if name in host.options}
    server = mcp.StdioServerParameters(command=words[0], args=words[1:], **places)
    return lambda: McpSession(host, mcp.MCPError, lambda: mcp.Client(server))


class McpSession:
    """One episode: one session."""

    def __init__(self, host: Host, error: Any, client: Callable[[], Any]) -> None:
        self._host, self._error, self._make_client = host, error, client
        self._session: asyncio.Task[None] | None = None
        self._names: set[str] = set()

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        return {"messages": [], "tools": self._host.resolve(self._connect())}

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        messages, errors = [], 0
        for call in tool_calls:
            content, failed = self._result(call)
            errors += failed
            message = {"role": "tool", "name": str(call.get("name", "")), "content": content}
            messages.append({**message, "tool_call_id": str(call["id"])} if call.get("id") else message)
        return {
            "messages": messages,
            "done": not tool_calls,
            "metrics": {"tool_calls": len(tool_calls), "tool_errors": errors},
        }

    def finish(self) -> dict[str, Any]:
        return {"reward": None}

    def close(self) -> None:
        if self._session is not None:
            self._closing.set()
            self._host.resolve(self._session)

    async def _keep(self, opened: asyncio.Future[Any]) -> None:
        """Hold the session open, in one task, as its cancel scopes need it."""
        try:
            async with self._make_client() as client:
                opened.set_result(client)
                await self._closing.wait()
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    async def _connect(self) -> list[dict[str, Any]]:
        """Open the session; the schemas of its tools."""
        self._closing = asyncio.Event()
        opened = asyncio.get_running_loop().create_future()
        self._session = asyncio.ensure_future(self._keep(opened))
        self._client = await opened
        tools, cursor = [], None
        while True:
            listed = await self._client.list_tools(cursor=cursor)
            tools += listed.tools
            cursor = getattr(listed, "next_cursor", None)
            if cursor is None:
                break
        wanted = self._host.options.get("tools")
        missing = set(wanted or ()) - {tool.name for tool in tools}
        if missing:
            raise ValueError(
                f"environment.options.tools: the server has no {sorted(missing)}; it has {[tool.name for tool in tools]}"
            )
        chosen = [tool for tool in tools if wanted is None or tool.name in wanted]
        self._names = {tool.name for tool in chosen}
        functions = [
            {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            for tool in chosen
        ]
        return [{"type": "function", "function": function} for function in functions]

    def _result(self, call: dict[str, Any]) -> tuple[str, bool]:
        """(the message of a call's result, whether it is an error). Raises where the server is gone, which is no fault of
        the policy's."""
        name, arguments = call.get("name"), call.get("arguments", {})
        wrong = ""
        if name not in self._names:
            wrong = f"there is no tool {name}; there are {', '.join(sorted(self._names))}"
        elif not isinstance(arguments, dict):
            wrong = f"the arguments of {name} are not a JSON object"
        if wrong:
            return json.dumps({"error": wrong}, ensure_ascii=False), True
        try:
            result = self._host.resolve(self._client.call_tool(name, arguments))
        except self._error as error:
            if error.code in LOST:
                raise
            return json.dumps({"error": str(error)}, ensure_ascii=False), True
        texts = [block.text for block in result.content if getattr(block, "type", "") == "text"]
        if len(texts) < len(result.content):
            raise self._host.WrongAnswer(f"the tool {name} returned content that is not text")
        return "\n".join(texts), bool(result.is_error)
