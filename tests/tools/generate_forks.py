"""tools/generate.py many times over with one engine: each command runs in a process forked from this one.

Arguments: a folder with model/ and rows.jsonl. Writes report.json: exit statuses, seconds, how often and when it killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--max-tokens", "16", "--batch", "4"]


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Forks:
    """Commands by their output's name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.module = folder, tool()
        engine = self.module.OfflineEngine(folder / "model", stop=[1], dtype="float32", max_model_len=64, kv_cache_mib=16)
        self.module.OfflineEngine = lambda *_, **__: engine
        self.statuses: dict[str, int] = {}

    def start(self, name: str, *more: str) -> int:
        """Process id of a command that has been started."""
        child = os.fork()
        if child:
            return child
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        paths = ["--model", self.folder / "model", "--input", self.folder / "rows.jsonl", "--output", self.folder / name]
        status = 70
        try:
            status = self.module.main([*map(str, paths), *SETTINGS, *more])
        finally:
            os._exit(status)

    def run(self, name: str, *more: str) -> None:
        """A command to its end."""
        _, code = os.waitpid(self.start(name, *more), 0)
        self.statuses[name] = os.waitstatus_to_exitcode(code)

    def killed(self, name: str, most: float, *more: str) -> list[int]:
        """A command, killed after up to `most` seconds until it comes to its end; bytes that there were at each kill."""
        chance, kills = random.Random(7), []
        while True:
            child = self.start(name, *more)
            # more and more patient, so that it ends
            deadline = time.monotonic() + chance.uniform(0, most) * (1 + len(kills) / 4)
            while time.monotonic() < deadline:
                gone, code = os.waitpid(child, os.WNOHANG)
                if gone:
                    self.statuses[name] = os.waitstatus_to_exitcode(code)
                    return kills
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            part = self.folder / f"{name}.part-0"
            kills.append(part.stat().st_size if part.exists() else 0)


def main() -> None:
    folder = Path(sys.argv[1])
    forks = Forks(folder)
    start = time.monotonic()
    forks.run("whole.jsonl", "--num-samples", "2", "--logprobs")
    seconds = time.monotonic() - start
    kills = forks.killed("killed.jsonl", seconds / 2, "--num-samples", "2", "--logprobs")
    forks.run("greedy.jsonl", "--temperature", "0", "--logprobs")
    forks.run("again.jsonl", "--num-samples", "2", "--logprobs", "--seed", "1")
    forks.run("chat.jsonl", "--chat", "--system", "Add.", "--prompt-field", "question")
    (folder / "report.json").write_text(json.dumps({"statuses": forks.statuses, "seconds": seconds, "kills": kills}))
    os._exit(0)


if __name__ == "__main__":
    main()
