"""Environments that misbehave in every way that the pool has to survive; one file, run by environment processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import subprocess
import sys
import time


class Rogue:
    """A class with reset and step whose step does what the text says; it counts its steps."""

    def __init__(self, **_: object) -> None:
        self.steps = 0

    def reset(self, row: dict, seed: int) -> str:
        self.row = row
        if row.get("reset"):
            return self.act(row["reset"])
        return f"task {row.get('q')} seed {seed}"

    def step(self, text: str) -> object:
        self.steps += 1
        return self.act(text)

    def act(self, text: str) -> object:
        what, _, rest = text.partition(" ")
        return getattr(self, what)(rest)

    def say(self, rest: str) -> object:
        return f"{self.steps}: {rest}", 0.5, False

    def end(self, rest: str) -> object:
        return None, 1.0, True, {"steps": self.steps}

    def sleep(self, rest: str) -> object:
        time.sleep(float(rest))
        return f"slept {rest}"

    def regex(self, rest: str) -> object:  # keeps Python's global lock for ever
        re.match(r"(a+)+$", "a" * 64 + "b")
        return ""

    def exit(self, rest: str) -> object:
        print("my last words")
        os._exit(int(rest))

    def sysexit(self, rest: str) -> object:
        sys.exit(int(rest))

    def segfault(self, rest: str) -> object:
        ctypes.string_at(0)
        return ""

    def once(self, rest: str) -> object:
        """Kill the process the first time only: `rest` is a file that says so."""
        if not os.path.exists(rest):
            open(rest, "w").close()
            os.kill(os.getpid(), 9)
        return "survived"

    def kill(self, rest: str) -> object:
        os.kill(os.getpid(), 9)
        return ""

    def eat(self, rest: str) -> object:
        eaten = []
        while True:
            eaten.append(bytearray(16 * 2**20))

    def huge_later(self, rest: str) -> object:
        time.sleep(0.5)
        return "x" * int(rest)

    def closes(self, rest: str) -> object:
        """Start a process, close all pipes, and go on; `rest`: as of `child`."""
        self.child(rest)
        os.closerange(3, 100)
        time.sleep(300)
        return ""

    def huge(self, rest: str) -> object:
        return "x" * int(rest)

    def latin(self, rest: str) -> object:
        return "\udcff broken"

    def raw(self, rest: str) -> object:
        return b"\xff\xfe"

    def thing(self, rest: str) -> object:
        return object()

    def role(self, rest: str) -> object:
        return [{"role": "wizard", "content": "x"}]

    def content(self, rest: str) -> object:
        return [{"role": "user", "content": 3}]

    def reward(self, rest: str) -> object:
        return "x", {"nan": float("nan"), "text": "much"}[rest], False

    def done(self, rest: str) -> object:
        return "x", 1.0, "maybe"

    def fields(self, rest: str) -> object:
        return {"observation": "x", "rewrad": 1.0}

    def raises(self, rest: str) -> object:
        raise KeyError("a key")

    def prints(self, rest: str) -> object:
        for _ in range(int(rest)):
            print("noise " * 1000)
            sys.stderr.write("noise\n")
        os.write(1, b"noise")
        return "printed"

    def forge(self, rest: str) -> object:
        """Write to every open descriptor what is no message."""
        forged = {"text": b"\x00\x00\x00\x04oops", "size": b"\xff\xff\xff\xff", "utf": b"\x00\x00\x00\x02\xff\xfe"}[
            rest
        ]
        for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
            if fd > 2:
                with contextlib.suppress(OSError):
                    os.write(fd, forged)
        time.sleep(60)
        return ""

    def child(self, rest: str) -> object:
        """Start a process that would outlive this one."""
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        with open(rest, "w") as file:
            file.write(f"{child.pid} {os.getpid()}")
        return "started"

    def pid(self, rest: str) -> object:
        return str(os.getpid())

    def chance(self, rest: str) -> object:
        return str(random.random())

    def clock(self, rest: str) -> object:
        return str(time.time_ns())

    def env(self, rest: str) -> object:
        return repr(os.environ.get(rest))

    def version(self, rest: str) -> object:
        return sys.version.split()[0] + " " + str("torch" in sys.modules) + " " + str("aligner" in sys.modules)
