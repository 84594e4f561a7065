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

from aligner.models.read_spec import read_spec
from aligner.rollout.engines import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--max-tokens", "16", "--batch", "3"]


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
        stop = read_spec(folder / "model").eos_token_ids
        settings = {"stop": stop, "dtype": "float32", "max_model_len": 64, "kv_cache_mib": 16}
        engines = {name: one.offline_type()(folder / "model", **settings) for name, one in BACKENDS.items()}
        self.module.make_engine = lambda args, *_: engines[args.engine]
        self.statuses: dict[str, int] = {}

    def start(self, name: str, *more: str) -> int:
        """Process id of a command that has been started."""
        child = os.fork()
        if child:
            return child
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        paths = [
            "--model",
            self.folder / "model",
            "--input",
            self.folder / "rows.jsonl",
            "--output",
            self.folder / name,
        ]
        status = 70
        try:
            status = self.module.main([*map(str, paths), *SETTINGS, *more])
        finally:
            os._exit(status)

    def run(self, name: str, *more: str) -> None:
        """A command to its end."""
        _, code = os.waitpid(self.start(name, *more), 0)
        self.statuses[name] = os.waitstatus_to_exitcode(code)

    def killed(self, name: str, times: int, size: int, seconds: float, *more: str) -> list[int]:
        """A command that is killed so often and then comes to its end; bytes that there were at each kill.

        Args:
            size: bytes that it writes in all. Each kill comes a moment after a random part of what is left.
            seconds: that it takes, about.
        """
        chance, kills = random.Random(7), [0]
        part = self.folder / f"{name}.part-0"
        while len(kills) <= times:
            child = self.start(name, *more)
            wanted = kills[-1] + chance.uniform(0, 0.6) * (size - kills[-1])
            while self._written(part) < wanted and not (self.folder / name).exists():
                time.sleep(0.0002)
            time.sleep(chance.uniform(0, seconds / 10))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if not part.exists():
                break  # it had come to its end
            kills.append(self._written(part))
        self.run(name, *more)
        return kills[1:]

    def _written(self, part: Path) -> int:
        try:
            return part.stat().st_size
        except FileNotFoundError:
            return 0


def main() -> None:
    folder = Path(sys.argv[1])
    forks = Forks(folder)
    start = time.monotonic()
    forks.run("whole.jsonl", "--num-samples", "2", "--logprobs")
    seconds = time.monotonic() - start
    size = (folder / "whole.jsonl").stat().st_size
    kills = forks.killed("killed.jsonl", 8, size, seconds, "--num-samples", "2", "--logprobs")
    forks.run("greedy.jsonl", "--temperature", "0", "--logprobs")
    forks.run("transformers.jsonl", "--num-samples", "2", "--logprobs", "--engine", "transformers")
    forks.run("greedy_transformers.jsonl", "--temperature", "0", "--logprobs", "--engine", "transformers")
    forks.run("again.jsonl", "--num-samples", "2", "--logprobs", "--seed", "1")
    forks.run("chat.jsonl", "--chat", "--system", "Add: ", "--prompt-field", "question", "--temperature", "0.5")
    (folder / "report.json").write_text(json.dumps({"statuses": forks.statuses, "seconds": seconds, "kills": kills}))
    os._exit(0)


if __name__ == "__main__":
    main()
