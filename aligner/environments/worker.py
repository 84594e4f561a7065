"""A process of environments (standard library only, Python 3.8 or newer; nothing else of aligner is imported by it).

    python worker.py REQUESTS_FD ANSWERS_FD ADAPTERS_FOLDER

Each message is JSON in UTF-8 after its length (4 bytes, big endian). The first request holds the settings; it is answered by
{"ready": true} or {"unusable": why}. Each further one is {"id", "episode", "call": "open", "step", "finish" or "close", ...},
answered twice: by {"id", "begun": [ident, native id, nanoseconds of CPU time of its thread]} once it runs, from where its time
limit counts; and by {"id", "seconds", "turn" or "final"}, {"id", "closed": true} or {"id", "failed": kind, "detail"}. The calls of
an episode run one after the other in a thread of its own; those of different episodes at the same time. {"ping": n} is
answered by {"pong": n} unless a call keeps Python's global lock.

What the environment prints goes to standard error, a file of limited size. An adapter (adapters/NAME.py) is a file with
`make(host)`, which imports the environment and returns a factory of episodes with `open(row, seed)`, `step(text, tool_calls)`,
`finish()` and `close()`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import queue
import random
import re
import resource
import select
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

LENGTH = struct.Struct(">I")
FRAME_LIMIT = 16 * 2**20
"""Largest message, in bytes."""
LOG_BYTES = 2**20
"""Bytes of the log (standard error) beyond which it is begun anew."""
LOG_CHECK_S = 0.5
STACK_BYTES = 2 * 2**20
"""Stack of an episode's thread, which counts as memory of the process."""
WRITE_LIMIT = 2**30
"""Largest file that the environment may write, in bytes: a runaway log must not fill the disk."""
DETAIL_CHARS = 2000
TOOLS = ("interpreter", "http")
"""Targets that are tools of ours."""
NOTE = "\n[... {} characters left out ...]\n"

of_episode = threading.local()
"""What belongs to the episode of the running thread: `loop`, its event loop, once something was awaited."""


class Unusable(Exception):
    """The environment cannot be made with these settings; the text names the setting and what would work."""


class WrongAnswer(Exception):
    """The environment answered with something else than was agreed: a failure of kind `protocol`."""


class Host:
    """What an adapter gets from the process that it runs in."""

    Unusable = Unusable
    WrongAnswer = WrongAnswer

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.target: str = settings["target"]
        self.options: dict[str, Any] = settings["options"]
        self.folder: str = settings["adapters"]
        """Where the adapters stand."""

    def load(self, target: str, setting: str = "environment.target") -> Any:
        """The object `package.module:NAME` or `path/to/file.py:NAME`; without `:NAME`, the module.

        Raises:
            Unusable: it cannot be imported; names the setting.
        """
        place, colon, name = target.partition(":")
        try:
            module = load_file(place) if place.endswith(".py") else importlib.import_module(place)
        except MemoryError:
            raise Unusable(f"{setting}={target} needs more memory than environment.memory_mib allows") from None
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            hint = "" if place.endswith(".py") else f" (environment.python={sys.executable} runs it)"
            raise Unusable(f"{setting}={target}: {place} cannot be imported: {reason}{hint}") from error
        if not colon:
            return module
        if not hasattr(module, name):
            names = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))[:20])
            raise Unusable(f"{setting}={target}: {place} has no {name!r}; it has {names}")
        return getattr(module, name)

    @staticmethod
    def resolve(value: Any) -> Any:
        """The value, awaited in the episode's own event loop where it is awaitable."""
        if not inspect.isawaitable(value):
            return value
        if getattr(of_episode, "loop", None) is None:
            of_episode.loop = asyncio.new_event_loop()

        async def awaited() -> Any:
            return await value

        return of_episode.loop.run_until_complete(awaited())

    def text_of(self, value: Any, what: str) -> str:
        """What a tool or an environment returned, as text: text as it is, UTF-8 bytes decoded, JSON for what is made of values (arrays,
        sets, dataclasses and models too), for other objects their `str`.

        Raises:
            WrongAnswer: bytes that are not UTF-8, or an object whose `str` is its address in memory.
        """
        if isinstance(value, str):
            return value
        if isinstance(value, (bytes, bytearray)):
            try:
                return bytes(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise WrongAnswer(f"{what} returned bytes that are not UTF-8: {error}") from None
        try:
            plain = value if value is None or isinstance(value, (dict, list, tuple, int, float)) else plain_value(value)
            return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=plain_value)
        except (TypeError, ValueError, RecursionError):  # keys that are no text, circles, objects without a text
            text = own_text(value)
            if text is None:
                kind = type(value).__name__
                raise WrongAnswer(f"{what} returned a {kind}, which is neither text nor JSON") from None
            return text

    def messages(self, observation: Any, what: str = "the environment") -> list[dict[str, Any]]:
        """An observation as messages: none for None and "", a user message for text, messages as they are."""
        if observation is None or (isinstance(observation, str) and not observation):
            return []
        if isinstance(observation, dict) and "role" in observation:
            return [observation]
        if isinstance(observation, (list, tuple)) and all(
            isinstance(message, dict) and "role" in message for message in observation
        ):
            return [dict(message) for message in observation]
        return [{"role": "user", "content": self.text_of(observation, what)}]


def plain_number(value: Any) -> Any:
    """A number of another package (numpy) as Python's; for json.dumps."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(type(value).__name__)


def plain_value(value: Any) -> Any:
    """What json.dumps takes in place of a value that tools return: that of an array, a set, an enumeration, a dataclass or a model; of
    others the text."""
    if hasattr(value, "tolist"):  # numpy's numbers and arrays, tensors
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # strings in a set have no order that another process has too
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return value.model_dump()
    text = own_text(value)
    if text is None:
        raise TypeError(type(value).__name__)
    return text


def own_text(value: Any) -> str | None:
    """`str` of a value; None if that says where it is in memory, which no two processes agree on."""
    try:
        text = str(value)
        text.encode("utf-8")
    except Exception:
        return None
    return None if re.search(r" at 0x[0-9a-fA-F]+>", text) else text


def load_file(path: str) -> Any:
    """Import a file by its path, under a name that shadows no module; files beside it can be imported by it."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    name = "environment_file_" + os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == path:
        return sys.modules[name]
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return run_file(name, path)


def run_file(name: str, path: str) -> Any:
    """A new module of this name from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


class GlobalRandom:
    """Lets one call at a time run, each episode with global random generators (random, numpy.random) of its own: for
    environments that draw from those, several episodes in a process, and yet the same in each run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def call(self, states: dict[str, Any], seed: int | None, begun: Callable[[], None], call: Callable[[], Any]) -> Any:
        """Run a call; `states` keeps the generators' states between the calls of an episode; `seed`: begin anew from it."""
        with self._lock:
            begun()
            numpy = sys.modules.get("numpy")
            if seed is not None:
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed % 2**32)
            else:
                random.setstate(states["random"])
                if numpy is not None and "numpy" in states:
                    numpy.random.set_state(states["numpy"])
            try:
                return call()
            finally:
                states["random"] = random.getstate()
                numpy = sys.modules.get("numpy")
                if numpy is not None:
                    states["numpy"] = numpy.random.get_state()


class Worker:
    """The process: reads requests, hands them to the episodes' threads, writes answers."""

    def __init__(self, requests: int, answers: int, adapters: str) -> None:
        self._requests, self._answers, self._adapters = requests, answers, adapters
        self._write_lock = threading.Lock()
        self._episodes: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._buffer = b""
        self._log_checked = 0.0
        self._make: Callable[[], Any] = object
        self._random: GlobalRandom | None = None
        self.limits: tuple[int, bool] = (0, False)

    def run(self) -> None:
        """Serve until the other end closes."""
        settings = self._read()
        if settings is None:
            return
        self.limits = (settings["max_output_chars"], settings["long_output"] == "cut")
        limit_memory(settings["memory_bytes"])
        try:
            self._load(settings)
        except Unusable as error:
            return self._write({"unusable": str(error)})
        except BaseException as error:
            return self._write({"unusable": f"environment.target={settings['target']}: {error_text(error)}"})
        self._write({"ready": True})
        while True:
            request = self._read()
            if request is None:
                return
            if "ping" in request:
                self._write({"pong": request["ping"]})
            else:
                self._hand_over(request)

    def _load(self, settings: dict[str, Any]) -> None:
        settings["adapters"] = self._adapters
        host = Host(settings)
        kind = kind_of(host)
        adapter = run_file("environment_adapter_" + kind, os.path.join(self._adapters, kind + ".py"))
        self._make = adapter.make(host)
        if settings["alone"] or getattr(adapter, "GLOBAL_RANDOM", False):
            self._random = GlobalRandom()

    def _hand_over(self, request: dict[str, Any]) -> None:
        episode = request["episode"]
        if request["call"] == "open":
            inbox: queue.Queue[dict[str, Any]] = queue.Queue()
            self._episodes[episode] = inbox
            thread = threading.Thread(target=self._play, args=(inbox,), daemon=True, name=f"episode-{episode}")
            try:
                thread.start()
            except RuntimeError as error:  # no memory for its stack
                return self._write({"id": request["id"], "failed": "memory", "detail": str(error)})
        if episode in self._episodes:  # else it has ended by itself
            self._episodes[episode].put(request)
        if request["call"] in ("close", "finish"):
            self._episodes.pop(episode, None)

    def _play(self, inbox: queue.Queue[dict[str, Any]]) -> None:
        """The thread of an episode."""
        environment: list[Any] = []
        states: dict[str, Any] = {}
        while True:
            request = inbox.get()
            call = request["call"]
            if call == "close":
                answer = {"id": request["id"], "closed": True}
            else:
                try:
                    answer = self._answer(environment, request, states)
                except BaseException as error:
                    kind, detail = failure_of(error)
                    answer = {"id": request["id"], "failed": kind, "detail": detail[:DETAIL_CHARS]}
            self._send(request["id"], answer)
            if call in ("close", "finish"):
                return self._close(environment)

    def _answer(self, environment: list[Any], request: dict[str, Any], states: dict[str, Any]) -> dict[str, Any]:
        """The answer to open, step or finish. `environment`: none before it is opened, then one."""

        def call() -> Any:
            if request["call"] == "open":
                environment.append(self._make())
                return environment[0].open(request["row"], request["seed"])
            if request["call"] == "step":
                return environment[0].step(request["text"], request["tool_calls"])
            return environment[0].finish()

        began = time.monotonic()

        def begun() -> None:
            nonlocal began
            began = time.monotonic()
            thread = [threading.get_ident(), threading.get_native_id(), time.thread_time_ns()]
            self._write({"id": request["id"], "begun": thread})

        if self._random is None:
            begun()
            answer = call()
        else:
            answer = self._random.call(states, request.get("seed"), begun, call)
        result = {"final": answer} if request["call"] == "finish" else {"turn": self._limited(answer)}
        return {"id": request["id"], "seconds": time.monotonic() - began, **result}

    def _limited(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn, its long messages cut. Raises WrongAnswer where they may not be."""
        limit, cut = self.limits
        for message in turn["messages"]:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str) and len(content) > limit:
                if not cut:
                    size = f"{len(content)} characters, more than environment.max_output_chars={limit}"
                    raise WrongAnswer("a message has " + size)
                message["content"] = shortened(content, limit)
                metrics = turn.setdefault("metrics", {})
                metrics["cut_messages"] = metrics.get("cut_messages", 0) + 1
        return turn

    def _close(self, environment: list[Any]) -> None:
        loop = getattr(of_episode, "loop", None)
        try:
            for one in environment:
                one.close()
        except BaseException:
            traceback.print_exc()  # the episode is over; it stands in the log
        if loop is not None:
            loop.close()

    def _send(self, call: int, answer: dict[str, Any]) -> None:
        """Write an answer; what JSON in UTF-8 cannot hold becomes a failure."""
        try:
            self._write(answer)
        except UnicodeEncodeError as error:
            reason = f"it is not UTF-8: {error}"
        except (TypeError, ValueError, RecursionError) as error:
            reason = str(error)
        except MemoryError as error:
            kind, detail = failure_of(error)
            return self._write({"id": call, "failed": kind, "detail": detail})
        else:
            return
        self._write({"id": call, "failed": "protocol", "detail": f"the answer cannot be sent: {reason[:DETAIL_CHARS]}"})

    def _write(self, message: dict[str, Any]) -> None:
        """Write a message.

        Raises:
            ValueError (UnicodeEncodeError among them), TypeError: it is not JSON, or too large.
        """
        body = json.dumps(message, ensure_ascii=False, default=plain_number).encode("utf-8")
        if len(body) > FRAME_LIMIT:
            raise ValueError(f"it has {len(body)} bytes, more than {FRAME_LIMIT}")
        with self._write_lock:
            view = memoryview(LENGTH.pack(len(body)) + body)
            while view:
                view = view[os.write(self._answers, view) :]

    def _read(self) -> dict[str, Any] | None:
        """The next request; None at the end. Keeps the log short while it waits."""
        poller = select.poll()  # takes descriptors of any number: it is the rank's, which may have thousands
        poller.register(self._requests, select.POLLIN)
        while len(self._buffer) < 4 or len(self._buffer) < 4 + LENGTH.unpack(self._buffer[:4])[0]:
            ready = poller.poll(LOG_CHECK_S * 1000)
            if time.monotonic() > self._log_checked + LOG_CHECK_S:
                self._log_checked = time.monotonic()
                restart_long_log()
            if not ready:
                continue
            piece = os.read(self._requests, 1 << 16)
            if not piece:
                return None
            self._buffer += piece
        end = 4 + LENGTH.unpack(self._buffer[:4])[0]
        body, self._buffer = self._buffer[4:end], self._buffer[end:]
        request: dict[str, Any] = json.loads(body.decode("utf-8"))
        return request


def kind_of(host: Host) -> str:
    """environment.kind, or what it is for this target."""
    kind: str = host.settings["kind"]
    if kind != "auto":
        return kind
    if host.target.startswith(("http://", "https://", "ws://", "wss://")):
        return "openenv"
    if host.target in TOOLS:
        return "tools"
    if ":" not in host.target and not host.target.endswith(".py"):
        raise Unusable(
            f"environment.target={host.target} is neither module:NAME nor file.py:NAME; set environment.kind"
        )
    loaded = host.load(host.target)
    return "steps" if inspect.isclass(loaded) and hasattr(loaded, "step") else "tools"


def shortened(text: str, limit: int) -> str:
    """The beginning and the end of a text with a note between them: `limit` characters, without the note."""
    head = (limit + 1) // 2
    return text[:head] + NOTE.format(len(text) - limit) + text[len(text) - (limit - head) :]


def failure_of(error: BaseException) -> tuple[str, str]:
    """(kind of failure, detail) of what a call raised."""
    if isinstance(error, WrongAnswer):
        return "protocol", str(error)
    if isinstance(error, MemoryError):
        return "memory", "more than environment.memory_mib allows: " + error_text(error)
    return "error", error_text(error)


def error_text(error: BaseException) -> str:
    """An exception with the last place of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be made)"
    return f"{type(error).__name__}{place}: {text[:DETAIL_CHARS]}"


def restart_long_log() -> None:
    """Empty the log (standard error, a file opened to append) where it has become long."""
    try:
        if os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)
    except OSError:  # it is not a file
        pass


def limit_memory(memory_bytes: int | None) -> None:
    """Limit the private memory of this process, and of each that it starts; and the size of the files that it writes."""
    limits = {resource.RLIMIT_FSIZE: WRITE_LIMIT, resource.RLIMIT_CORE: 0}
    if memory_bytes is not None:
        limits[resource.RLIMIT_DATA] = memory_bytes
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, hard if which == resource.RLIMIT_FSIZE else value))


def main() -> None:
    """See the module docstring."""
    requests, answers, adapters = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for fd in (requests, answers):
        os.set_inheritable(fd, False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    threading.stack_size(STACK_BYTES)
    sys.path[0] = os.getcwd()  # not this folder, whose names (mcp.py, textarena.py) are those of packages
    sys.argv = sys.argv[:1]
    try:
        Worker(requests, answers, adapters).run()
    except BrokenPipeError:
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without waiting for the environments' threads


if __name__ == "__main__":
    main()
