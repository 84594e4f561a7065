"""Process exit: remove temporary files and report the exit status to the launcher (no torch).

Libraries leave folders in TMPDIR that they would remove at interpreter exit, which ranks skip (see `World.leave`) and which
signals prevent. So each process has its own TMPDIR, which is removed when it exits.
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

from aligner.health.process_identity import GONE, Process, identify, machine_id

PREFIX = "aligner-"
OWN_FOLDER = "ALIGNER_OWN_FOLDER"
"""Environment variable "PID:FOLDER" of the process that owns the folder; its children ignore it."""
EXIT_STATUS_FOLDER = "ALIGNER_ENDS"
"""Environment variable: folder in which ranks report their exit status to `aligner.launcher`."""


@contextmanager
def temporary_folder() -> Iterator[Path | None]:
    """Give this process its own TMPDIR, removed at the end of the block or by `exit_process`.

    Also removes folders left by killed processes of this machine. Yields None, changing nothing, if no folder can be
    created.
    """
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", OWN_FOLDER)}
    outside, previous_tempdir = Path(tempfile.gettempdir()), tempfile.tempdir
    me = identify()
    try:
        _remove_leftovers(outside)
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_here()}-{me.pid}-{me.started}-"))
    except OSError:
        yield None
        return
    with contextlib.suppress(KeyError, OSError):  # keep torch's compile cache in its usual place, for the next run
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(outside / f"torchinductor_{user}"))
    os.environ |= {"TMPDIR": str(folder), OWN_FOLDER: f"{me.pid}:{folder}"}
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        _remove()
        tempfile.tempdir = previous_tempdir
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def exit_process(code: int) -> NoReturn:
    """Exit immediately, from any thread, after removing this process's temporary folder and reporting `code`."""
    try:
        if threading.current_thread() is threading.main_thread():  # another thread could block on a stuck main thread
            with contextlib.suppress(Exception):  # the console is gone, or a signal handler interrupted a write
                sys.stdout.flush()
                sys.stderr.flush()
        if EXIT_STATUS_FOLDER in os.environ and "RANK" in os.environ:
            with contextlib.suppress(OSError):
                text = f"{os.environ.get('LOCAL_WORLD_SIZE', '1')} {code}"
                (Path(os.environ[EXIT_STATUS_FOLDER]) / os.environ["RANK"]).write_text(text)
        _remove()
    finally:
        os._exit(code)


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler for the time before training: exit, with one line from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        os.write(2, f"aligner: {name}: exited before training began; nothing was changed.\n".encode())
    exit_process(128 + number)


def _remove() -> None:
    """Remove this process's folder, and empty folders that torchrun created for its ranks' logs."""
    pid, _, folder = os.environ.get(OWN_FOLDER, "").partition(":")
    if pid == str(os.getpid()):
        shutil.rmtree(folder, ignore_errors=True)
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    logs = next((path for path in parents if path.name.startswith("torchelastic_")), None)
    if logs is not None:
        for path, _, _ in os.walk(logs, topdown=False):  # folders with logs stay; another rank may do the same
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _here() -> str:
    return hashlib.sha256(machine_id().encode()).hexdigest()[:8]


def _remove_leftovers(outside: Path) -> None:
    for folder in outside.glob(f"{PREFIX}{_here()}-*"):
        match = re.fullmatch(rf"{PREFIX}{_here()}-(\d+)-(\d+)-.*", folder.name)
        with contextlib.suppress(OSError):
            if match and Process(*map(int, match.groups())).state() == GONE and folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
