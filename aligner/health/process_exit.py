"""How a process leaves: with its temporary files, and with a word to its launcher (no torch).

Libraries leave folders in TMPDIR that they would remove when the interpreter ends, which ranks do not wait for (see
`World.leave`), and which a signal prevents. So each process has a folder of its own there, which goes with it.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from aligner.health.process_identity import GONE, Process, machine, process

PREFIX = "aligner-"
OWN = "ALIGNER_OWN_FOLDER"
"""The environment's name for "PID:FOLDER" of the process that made it; those that it starts have no part in it."""
ENDS = "ALIGNER_ENDS"
"""The environment's name for the folder in which `aligner.launcher` hears how its ranks have ended."""


@contextmanager
def own_folder() -> Iterator[Path | None]:
    """TMPDIR is a folder of this process's own, removed at the end of the block, or by `end`.

    What processes of this machine that were killed have left is removed as well. None, and nothing changes, where no
    folder can be made.
    """
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", OWN)}
    outside, given = Path(tempfile.gettempdir()), tempfile.tempdir
    me = process()
    try:
        _sweep(outside)
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_here()}-{me.pid}-{me.started}-"))
    except OSError:
        yield None
        return
    with contextlib.suppress(KeyError, OSError):  # what torch compiles is kept for the next run, where it looks for it
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(outside / f"torchinductor_{user}"))
    os.environ |= {"TMPDIR": str(folder), OWN: f"{me.pid}:{folder}"}
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        _remove()
        tempfile.tempdir = given
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def end(code: int) -> NoReturn:
    """Leave at once, from any thread, with all that `own_folder` would remove."""
    try:
        if threading.current_thread() is threading.main_thread():  # another would wait for one that cannot write
            with contextlib.suppress(Exception):  # a console that is gone, or that a signal's handler interrupts
                sys.stdout.flush()
                sys.stderr.flush()
        if ENDS in os.environ and "RANK" in os.environ:
            with contextlib.suppress(OSError):
                text = f"{os.environ.get('LOCAL_WORLD_SIZE', '1')} {code}"
                (Path(os.environ[ENDS]) / os.environ["RANK"]).write_text(text)
        _remove()
    finally:
        os._exit(code)


def at_once(number: int, frame: FrameType | None) -> None:
    """A signal's handler before there is anything to save; the first rank says it in one line."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        os.write(2, f"aligner: {name}: ended before training had begun; nothing was changed.\n".encode())
    end(128 + number)


def _remove() -> None:
    """This process's folder, and the empty ones that torchrun has made for logs of its ranks."""
    pid, _, folder = os.environ.get(OWN, "").partition(":")
    if pid == str(os.getpid()):
        shutil.rmtree(folder, ignore_errors=True)
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    logs = next((path for path in parents if path.name.startswith("torchelastic_")), None)
    if logs is not None:
        for path, _, _ in os.walk(logs, topdown=False):  # what holds a log stays; another rank may do the same
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _here() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def _sweep(outside: Path) -> None:
    for left in outside.glob(f"{PREFIX}{_here()}-*"):
        found = re.fullmatch(rf"{PREFIX}{_here()}-(\d+)-(\d+)-.*", left.name)
        with contextlib.suppress(OSError):
            if found and Process(*map(int, found.groups())).state() == GONE and left.lstat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
