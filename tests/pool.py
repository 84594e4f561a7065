"""Ranks that stay: a world is made once for a module's tests, and each test runs a function on all of its ranks.

    def test_norms(ranks):
        assert ranks(2).run("tests.norms_on_ranks:norms", folder) == [1.0, 1.0]    # norms(world, folder) on each rank

The function's module is imported by the ranks alone. Where it raises on some rank, hangs or ends the process, the test fails
with what each rank said, and the next test has new ranks.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import select
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests import fork_server

GRACE = 5.0
"""Once a rank has failed, the others have so many seconds: they wait for it, or fail too."""


class RankError(AssertionError):
    """What went wrong on ranks of a pool, with their tracebacks and output."""


class Pool:
    """A world of `size` ranks, started when they are first needed."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self._folder = size, folder
        self._ranks: list[tuple[subprocess.Popen[bytes], socket.socket]] = []

    def run(self, function: str, *arguments: Any, seconds: float = 120) -> list[Any]:
        """What `function(world, *arguments)` returns on each rank, where `world` is an `aligner.spmd.world.World`.

        Args:
            function: "module:name".

        Raises:
            RankError: a rank failed, or not all came to the end within `seconds`.
        """
        if not self._ranks:
            self._start()
        for log in self._folder.glob("*.log"):
            os.truncate(log, 0)
        for _, connection in self._ranks:
            _send(connection, (function, arguments))
        replies = self._replies(seconds)
        if all(reply is not None and reply[0] for reply in replies):
            return [value for _, value in replies]  # type: ignore[misc]
        said = "\n".join(
            f"--- rank {rank}: {reply[1] if reply and not reply[0] else '' if reply else self._silent(rank, seconds)}\n"
            f"{(self._folder / f'{rank}.log').read_text(errors='replace')[-3000:]}"
            for rank, reply in enumerate(replies)
        )
        self.kill()
        raise RankError(f"{function}{arguments} on {self.size} ranks:\n{said}")

    def _silent(self, rank: int, seconds: float) -> str:
        status = self._ranks[rank][0].poll()
        return f"no end within {seconds} s, or waits for others" if status is None else f"ended with status {status}"

    def _replies(self, seconds: float) -> list[tuple[bool, Any] | None]:
        """(whether it returned, value or traceback) of each rank; None of a rank that gave no answer."""
        replies: list[tuple[bool, Any] | None] = [None] * self.size
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        end = time.monotonic() + seconds
        while waiting and (left := end - time.monotonic()) > 0:
            for connection in select.select(list(waiting), [], [], left)[0]:
                rank = waiting.pop(connection)
                try:
                    replies[rank] = _receive(connection)
                except (EOFError, OSError):  # the process has ended
                    self._ranks[rank][0].wait(GRACE)
                if replies[rank] is None or not replies[rank][0]:  # type: ignore[index]
                    end = min(end, time.monotonic() + GRACE)
        return replies

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder.mkdir(parents=True, exist_ok=True)
        for rank in range(self.size):
            ours, theirs = socket.socketpair()
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size}
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")},
                **{name: str(number) for name, number in numbers.items()},
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(fork_server.ROOT),
            }  # fmt: skip
            with theirs, (self._folder / f"{rank}.log").open("a") as log:
                process = fork_server.Popen(
                    [sys.executable, "-u", "-m", "tests.pool"], stdin=theirs, stdout=log, stderr=log, env=environment,
                    cwd=self._folder, start_new_session=True,
                )  # fmt: skip
            self._ranks.append((process, ours))

    def close(self) -> None:
        """End the world as a job ends it."""
        for _, connection in self._ranks:
            _send(connection, None)
        end = time.monotonic() + 120
        try:
            for process, _ in self._ranks:
                process.wait(max(0.1, end - time.monotonic()))
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        for process, connection in self._ranks:
            process.kill()
            process.wait()
            connection.close()
        self._ranks = []


def _send(connection: socket.socket, message: Any) -> None:
    body = pickle.dumps(message)
    connection.sendall(len(body).to_bytes(8, "big") + body)


def _receive(connection: socket.socket) -> Any:
    head = _exactly(connection, 8)
    return pickle.loads(_exactly(connection, int.from_bytes(head, "big")))


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        more = connection.recv(count - len(got))
        if not more:
            raise EOFError
        got += more
    return bytes(got)


def _plain(value: Any) -> Any:
    """`value`, where it can be pickled."""
    pickle.dumps(value)
    return value


def _serve() -> None:
    """One rank."""
    from aligner.spmd.world import World

    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    world = None
    while True:
        try:
            request = _receive(connection)
        except EOFError:  # the tests have ended
            os._exit(1)
        world = world or World(100)
        if request is None:
            world.leave()
        function, arguments = request
        try:
            module, _, name = function.partition(":")
            reply = (True, _plain(getattr(importlib.import_module(module), name)(world, *arguments)))
        except BaseException:
            reply = (False, re.sub(r'  File ".*tests/pool.py".*\n(    .*\n)*', "", traceback.format_exc()))
        _send(connection, reply)


if __name__ == "__main__":
    _serve()
