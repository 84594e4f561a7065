from __future__ import annotations

import datetime
import enum
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
from transformers.utils import get_json_schema

from aligner.environments import worker
from aligner.environments.adapters import tools
from aligner.environments.pool import Action, Finished, Stepped
from tests.environments import games
from tests.environments.adapters.in_process import GAMES, host
from tests.environments.drive import contents, pool


def many_types(
    a: int,
    b: list[str],
    c: dict[str, float],
    d: str | None = None,
    e: int | str = 3,
    f: Literal["x", "y"] = "x",
    g: tuple[int, str] = (1, "a"),
    h: bool = False,
    i: list[list[int]] | dict[str, int] | None = None,
    j: Any = None,
    k: Optional[list] = None,  # noqa: UP045
    l: Union[int, float, None] = None,  # noqa: UP007, E741
    m: Literal[1, "one", None] = 1,
) -> dict[str, list[int]]:
    """Try every type.

    This goes on for another paragraph.

    Args:
        a: An integer: with a colon.
        b: Strings
            over two lines.
        c: Numbers by name.

        d: Perhaps.
        e: Either.
        f: One of two.
        g: A pair.
        h: A flag.
        i: Nested.
        j: Anything.
        k: A list.
        l: A number.
        m: Mixed.

    Returns:
        Something
        of two lines.

    Raises:
        ValueError: never.
    """
    return {}


def choices(drink: str) -> None:
    """Order a drink.

    Args:
        drink: Which one (choices: ["tea", " coffee "])
    """


def no_arguments() -> str:
    """Tell the time.

    Returns:
        The time.
    """
    return ""


ALIKE: dict[str, Callable[..., Any]] = {
    "many_types": many_types,
    "choices": choices,
    "no_arguments": no_arguments,
    "method": games.Counter.increment,
    "bound": games.Counter().increment,
    "async_method": games.Counter.look,
    "function": games.add,
    "async_function": games.shout,
}


@pytest.mark.parametrize("name", ALIKE)
def test_schemas_are_those_of_transformers(name: str) -> None:
    assert tools.json_schema(ALIKE[name]) == get_json_schema(ALIKE[name])


def test_tools_of_a_class_are_those_of_trl() -> None:
    # as GRPOTrainer finds them (1.16, `environment_factory`)
    found = [
        name
        for name, _ in inspect.getmembers(games.Counter, predicate=inspect.isfunction)
        if name not in ("reset", "get_reward") and not name.startswith("_")
    ]
    assert list(tools.public_methods(games.Counter)) == found == ["increment", "look"]


def no_doc(a: int) -> None: ...


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """Do.

    Args:
        a: It.
    """


def no_description(a: int) -> None:
    """Do."""


def no_json(a: tuple[int, ...]) -> None:
    """Do.

    Args:
        a: It.
    """


@pytest.mark.parametrize(
    ("function", "why"),
    [(no_doc, "no docstring"), (no_hint, "no type hint"), (no_description, "no description"), (no_json, r"use list\[")],
)
def test_what_makes_no_schema(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(tools.SchemaError, match=why):
        tools.json_schema(function)


def test_an_episode_of_a_class() -> None:
    """What TRL would do with the class: results as messages, errors told, the observation after the prompt."""
    row = {"prompt": [{"role": "user", "content": "Go."}], "goal": 3, "told": True}
    episode = tools.make(host(":Counter", options={"limit": 5}))()
    opened = episode.open(row, 0)
    assert opened["messages"] == [{"role": "user", "content": "Go. Reach 3."}] and opened["replaces"]
    assert [schema["function"]["name"] for schema in opened["tools"]] == ["increment", "look"]
    calls: list[dict[str, Any]] = [
        {"name": "increment", "arguments": {"step": 3}, "id": "c1"},
        {"name": "increment", "arguments": {"step": 7}},
        {"name": "increment", "arguments": {"stride": 7}},
        {"name": "jump", "arguments": {}},
        {"name": "increment", "arguments": [1]},
        {"name": "look", "arguments": {}},
    ]
    turn = episode.step("", calls)
    results = [message["content"] for message in turn["messages"]]
    assert turn["messages"][0] == {"role": "tool", "name": "increment", "content": "3", "tool_call_id": "c1"}
    assert json.loads(results[1]) == {"error": "7 is more than 5"}
    assert "stride" in json.loads(results[2])["error"]
    assert json.loads(results[3]) == {"error": "there is no tool jump; there are increment, look"}
    assert json.loads(results[4]) == {"error": "the arguments of increment are not a JSON object"}
    assert results[5] == '{"value": 3, "é": null}'
    assert turn["metrics"] == {"tool_calls": 6, "tool_errors": 4} and not turn["done"]
    assert episode.step("It is 3.", [])["done"]
    assert episode.finish() == {"reward": 1.0}


def test_a_file_and_several_sources() -> None:
    """All public functions of a file, and a class beside it."""
    beside = f"{GAMES}:Counter"
    made = tools.make(host(str(GAMES), tools=[beside], tool_options={beside: {"limit": 2}}))()
    opened = made.open({"goal": 2}, 0)
    assert [schema["function"]["name"] for schema in opened["tools"]] == ["add", "shout", "increment", "look"]
    calls = [{"name": "add", "arguments": {"a": 1.5}}, {"name": "shout", "arguments": {"text": "a", "times": 2}}]
    results = made.step("", [*calls, {"name": "increment", "arguments": {"step": 2}}])["messages"]
    assert [message["content"] for message in results] == ["2.5", "AA", "2"]
    assert made.finish() == {"reward": 1.0}
    with pytest.raises(worker.Unusable, match="two tools named add"):
        tools.make(host(":add", tools=[str(GAMES)]))
    with pytest.raises(worker.Unusable, match="takes no options"):
        tools.make(host(":add", options={"x": 1}))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(302 if "moved" in body else 200 if "query" in body else 400)
            self.send_header("Location", body.get("moved", ""))
            self.end_headers()
            self.wfile.write(f"found {body.get('query')}".encode())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/search"
    server.shutdown()
    thread.join()
    server.server_close()


def test_tools_of_ours_and_of_a_user_in_processes(url: str) -> None:
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    search = {"url": url, "name": "search", "description": "Search.", "parameters": parameters}
    settings: dict[str, Any] = {
        "target": f"{GAMES}:shout",
        "tools": ("interpreter", "http"),
        "tool_options": {"http": search},
    }
    with pool(**settings) as made:
        made.open(0, {}, 0)
        (opened,) = made.poll(60.0)
        assert [tool["function"]["name"] for tool in opened.turn.tools] == ["shout", "python", "search"]  # type: ignore[union-attr]
        assert opened.turn.tools[2]["function"] == {
            "name": "search",
            "description": "Search.",
            "parameters": parameters,
        }  # type: ignore[union-attr, index]
        calls = [
            {"name": "shout", "arguments": {"text": "hey"}},
            {"name": "python", "arguments": {"code": "import sys\nprint(6 * 7)\nsys.exit(3)"}},
            {"name": "search", "arguments": {"query": "x"}},
            {"name": "search", "arguments": {"word": "x"}},
        ]
        made.step(0, Action("", calls))
        (stepped,) = made.poll(60.0)
        said = contents([stepped])
        assert said[:3] == ["HEY", "42\n[ended with exit code 3]", "found x"] and "400" in said[3]
        made.step(0, Action("done"))
        (ended,) = made.poll(60.0)
        assert isinstance(ended, Stepped) and ended.turn.done
        made.finish(0)
        assert made.poll(60.0) == [Finished(0, None)]


def test_a_redirect_is_not_followed(url: str) -> None:
    """The token would go to another host."""
    search = {"url": url, "name": "search", "description": "Search.", "parameters": {}}
    turn = tools.make(host("http", options=search))().step("", [{"name": "search", "arguments": {"moved": url}}])
    assert "302" in turn["messages"][0]["content"] and turn["metrics"]["tool_errors"] == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"target": "http", "options": {"url": "x", "name": "n", "description": "", "parameters": {}}},
            "url=x is no URL",
        ),
        (
            {"target": "interpreter", "options": {"isolation": "none"}},
            "isolation=none is unknown; use namespaces or limits",
        ),
        ({"target": "interpreter", "options": {"second": 1}}, "do not fit"),
        (
            {
                "target": "http",
                "options": {
                    "url": "http://x",
                    "name": "n",
                    "description": "",
                    "parameters": {},
                    "token_env": "NO_SUCH",
                },
            },
            "token_env=NO_SUCH is not set",
        ),
    ],
)
def test_options_of_our_tools(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(worker.Unusable, match=why):
        tools.make(host(**settings))


@dataclass
class Square:
    """What a tool may return."""

    file: str
    rank: int = 1


class Piece(enum.Enum):
    """What a tool may return."""

    ROOK = "rook"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        (3.5, "3.5"),
        ({"é": [1, (2, 3)]}, '{"é": [1, [2, 3]]}'),
        ([np.int64(1), np.arange(2), np.float32(0.5)], "[1, [0, 1], 0.5]"),
        (Square("a"), '{"file": "a", "rank": 1}'),
        ({"to": Square("b", 2), "piece": Piece.ROOK}, '{"to": {"file": "b", "rank": 2}, "piece": "rook"}'),
        ({"c", "a", "b"}, '["a", "b", "c"]'),
        (datetime.date(2026, 1, 31), "2026-01-31"),
        ({"when": datetime.timedelta(seconds=90)}, '{"when": "0:01:30"}'),
        ({(0, 1): "x"}, "{(0, 1): 'x'}"),
        (ValueError("so"), "so"),
        (Piece.ROOK, "rook"),
    ],
)
def test_what_a_tool_returns_is_text_json_or_its_own_text(value: object, text: str) -> None:
    assert host(":add").text_of(value, "the tool") == text


@pytest.mark.parametrize("value", [object(), [object()], {(0, 1): object()}, lambda: 1])
def test_an_address_in_memory_is_no_result(value: object) -> None:
    with pytest.raises(worker.WrongAnswer, match="neither text nor JSON"):
        host(":add").text_of(value, "the tool")
