"""Virtual environments with the packages that environments come in; never the tests' own.

ALIGNER_ENVIRONMENTS=FOLDER holds them from one run to the next; without it they are made in a temporary folder.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

PACKAGES = {
    "games": ("skyrl-gym==0.4.0", "reasoning-gym==0.1.25", "textarena==0.7.4", "mcp==2.3.0"),
    "openenv": ("openenv==0.10.0",),
    "verifiers": ("verifiers==0.4.0", "openai==2.54.0", "textarena==0.7.4", "nltk", "uv"),
}


@lru_cache
def interpreter(name: str) -> str:
    """The Python of a virtual environment of PACKAGES, made if it is not there."""
    folder = os.environ.get("ALIGNER_ENVIRONMENTS") or _temporary()
    python = Path(folder) / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return str(python)


@lru_cache
def _temporary() -> str:
    return tempfile.mkdtemp(prefix="environments-")


@contextmanager
def served(python: str, *arguments: str) -> Iterator[int]:
    """A server started with a free port as its last argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([python, *arguments, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120.0
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        server.kill()
        server.wait()
