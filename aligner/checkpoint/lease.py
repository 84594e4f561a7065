"""One job at a time in a run's folder: who is in it says so in a file there, as long as it lives (no torch).

The file holds host, process and start. It appears with its content in one step (a hard link, which every file system that
is shared between hosts makes atomically, NFS too), and a thread renews its time of change. Nothing is locked: file locks do
not hold across hosts everywhere. Who finds another's file looks whether that process lives, where process numbers mean the
same; elsewhere whether the file's time moves, by the file server's clock alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aligner.health.process_identity import GONE, Process, identify, machine_id

FILE = ".lease"
RENEWED = 5.0
"""Seconds between two renewals."""
STALE = 30.0
"""Seconds without a renewal after which an owner on another host is taken for dead."""
DYING = 15.0
"""Seconds that a rank whose launcher is gone gets to follow it."""


class Lease:
    """This job's hold of a folder, until `release`. Another may take it over only when this process is dead or stands
    still for `STALE` seconds; then `lost` says who."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file, self._content = file, content
        self._stopped = threading.Event()
        self.lost = ""
        """Who has taken the folder over."""
        threading.Thread(target=self._renew, name="aligner-lease", daemon=True).start()

    def release(self) -> None:
        """The folder is free at once, for any host."""
        self._stopped.set()
        if _read(self._file).get("id") == self._content["id"]:
            self._file.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stopped.wait(RENEWED):
            with contextlib.suppress(OSError):  # a file server that is away for a while
                found = _read(self._file)
                if found.get("id") == self._content["id"]:
                    os.utime(self._file)
                elif found:
                    self.lost = _told(found)
                    return
                elif not self._file.exists():
                    _create(self._file, self._content)


def take(run_dir: Path, launch: str) -> Lease:
    """Hold the folder; before anything of it is read or written.

    Args:
        launch: what all attempts of one launch have in common: they succeed one another without waiting.

    Raises:
        ValueError: a job that lives holds it (the message says which), or it cannot be written.
    """
    file, me = run_dir / FILE, identify()
    parent = identify(os.getppid())
    content = {
        "id": uuid.uuid4().hex, "host": os.uname().nodename, "machine": machine_id(), "pid": me.pid, "started": me.started,
        "launcher": [parent.pid, parent.started], "launch": launch, "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while not _create(file, content):
            owner = _wait_until_free(file, launch)
            if owner is not None:
                _remove(file, owner)
            time.sleep(0.02)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written ({error}); choose another folder.") from None
    return Lease(file, content)


def check_free(run_dir: Path, launch: str | None = None) -> None:
    """Raises ValueError where a job that lives holds the folder; as `take`, which it does not do."""
    _wait_until_free(run_dir / FILE, launch)


def _wait_until_free(file: Path, launch: str | None) -> dict[str, Any] | None:
    """The content of a lease whose owner is no more; None where there is no lease."""
    owner = _read(file)
    if not owner:  # there is none, or one that is not written yet; or whose owner never could
        return owner if file.exists() and _stands_still(file) else None
    if owner.get("machine") == machine_id():
        theirs, launcher = Process(owner["pid"], owner["started"]), Process(*owner["launcher"])
        patience = DYING if launcher.state() == GONE else 1.0
        gone = theirs == identify() or _within(patience, lambda: theirs.state() == GONE)
    else:
        gone = owner.get("launch") == launch or _stands_still(file)
    if not gone:
        raise ValueError(
            f"run_dir={file.parent} is in use by another job: {_told(owner)}. Wait until it has ended, end it, or choose "
            "another run_dir."
        )
    return owner


def _stands_still(file: Path) -> bool:
    """Whether nobody renews it. Both times are the file server's: hosts' clocks need not agree."""
    with contextlib.suppress(OSError):
        probe = file.with_name(f"{FILE}.{uuid.uuid4().hex}")
        probe.touch()
        try:
            if probe.stat().st_mtime - _moved(file) > 4 * STALE:
                return True
        finally:
            probe.unlink()
    before = _moved(file)
    return not _within(STALE, lambda: _moved(file) != before, period=0.5) or not file.exists()


def _moved(file: Path) -> float:
    """Its time of change, asked of the server: opening a file makes NFS look."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return 0.0


def _within(seconds: float, condition: Callable[[], bool], period: float = 0.05) -> bool:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(period)
    return found


def _create(file: Path, content: Mapping[str, Any]) -> bool:
    """Whether the file is now ours: it was not there, and is there with its content at once."""
    own = file.with_name(f"{FILE}.{content['id']}")
    own.write_text(json.dumps(content))
    try:
        os.link(own, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with file.open("x") as made:
                made.write(json.dumps(content))
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _remove(file: Path, owner: Mapping[str, Any]) -> None:
    """Take a dead owner's file away, not one that another has put there in the meantime."""
    aside = file.with_name(f"{FILE}.{uuid.uuid4().hex}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside).get("id") != owner.get("id"):
        with contextlib.suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _told(owner: Mapping[str, Any]) -> str:
    return (
        f"process {owner.get('pid')} (started by process {owner.get('launcher', [0])[0]}) on {owner.get('host')}, since "
        f"{owner.get('since')}"
    )
