"""A lease on a run folder, so that only one job uses it at a time (no torch).

The lease is a file with the owner's host, process id and start time. It is created atomically with its content (a hard link,
which is atomic on shared file systems including NFS), and a thread renews its modification time. File locks are not used,
because they do not work across hosts everywhere. On finding another's lease a job checks whether that process is alive, if it
runs on the same machine; otherwise whether the modification time advances, using only the file server's clock.
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
RENEW_PERIOD = 5.0
"""Seconds between two renewals."""
STALE = 30.0
"""Seconds without a renewal after which an owner on another host is considered dead."""
EXIT_GRACE = 15.0
"""Seconds that a rank has to exit after its launcher."""


class Lease:
    """This job's lease on a folder, until `release`. Another job may take it over only if this process is dead or does not
    renew it for `STALE` seconds; then `lost` names the new owner."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file, self._content = file, content
        self._stopped = threading.Event()
        self.lost = ""
        """Description of the job that has taken the folder over; "" while the lease is valid."""
        threading.Thread(target=self._renew, name="aligner-lease", daemon=True).start()

    def release(self) -> None:
        """Remove the lease; the folder is free immediately."""
        self._stopped.set()
        if _read(self._file).get("id") == self._content["id"]:
            self._file.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stopped.wait(RENEW_PERIOD):
            with contextlib.suppress(OSError):  # the file server is temporarily unreachable
                content = _read(self._file)
                if content.get("id") == self._content["id"]:
                    os.utime(self._file)
                elif content:
                    self.lost = _describe(content)
                    return
                elif not self._file.exists():
                    _create(self._file, self._content)


def acquire_lease(run_dir: Path, launch: str) -> Lease:
    """Acquire the lease on a folder, before anything in it is read or written.

    Args:
        launch: see `claim.launch`; an attempt takes over from an earlier one of the same launch without waiting.

    Raises:
        ValueError: a running job holds the lease (the message says which), or the folder is not writable.
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
        raise ValueError(f"run_dir={run_dir} is not writable ({error}); choose another folder.") from None
    return Lease(file, content)


def check_free(run_dir: Path, launch: str | None = None) -> None:
    """Raises ValueError if a running job holds the folder, as `acquire_lease`, but does not acquire it."""
    _wait_until_free(run_dir / FILE, launch)


def _wait_until_free(file: Path, launch: str | None) -> dict[str, Any] | None:
    """The content of a lease whose owner has ended; None if there is no lease. Raises ValueError if the owner is running."""
    owner = _read(file)
    if not owner:  # there is none, or it is not written yet, or its owner failed to write it
        return owner if file.exists() and _is_stale(file) else None
    if owner.get("machine") == machine_id():
        owner_process, launcher = Process(owner["pid"], owner["started"]), Process(*owner["launcher"])
        patience = EXIT_GRACE if launcher.state() == GONE else 1.0
        gone = owner_process == identify() or _within(patience, lambda: owner_process.state() == GONE)
    else:
        gone = owner.get("launch") == launch or _is_stale(file)
    if not gone:
        raise ValueError(
            f"run_dir={file.parent} is in use by another job: {_describe(owner)}. Wait until it has ended, stop it, or choose "
            "another run_dir."
        )
    return owner


def _is_stale(file: Path) -> bool:
    """Whether the lease is no longer renewed. Both times are the file server's, since the hosts' clocks may differ."""
    with contextlib.suppress(OSError):
        probe = file.with_name(f"{FILE}.{uuid.uuid4().hex}")
        probe.touch()
        try:
            if probe.stat().st_mtime - _modified(file) > 4 * STALE:
                return True
        finally:
            probe.unlink()
    before = _modified(file)
    return not _within(STALE, lambda: _modified(file) != before, period=0.5) or not file.exists()


def _modified(file: Path) -> float:
    """Modification time from the server: opening a file makes NFS revalidate its attributes."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return 0.0


def _within(seconds: float, condition: Callable[[], bool], period: float = 0.05) -> bool:
    end = time.monotonic() + seconds
    while not (fulfilled := condition()) and time.monotonic() < end:
        time.sleep(period)
    return fulfilled


def _create(file: Path, content: Mapping[str, Any]) -> bool:
    """Create the lease file atomically with its content. Returns False if it exists."""
    temporary = file.with_name(f"{FILE}.{content['id']}")
    temporary.write_text(json.dumps(content))
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with file.open("x") as opened:
                opened.write(json.dumps(content))
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _remove(file: Path, owner: Mapping[str, Any]) -> None:
    """Remove a dead owner's lease, but not one that another job has created in the meantime."""
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
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _describe(owner: Mapping[str, Any]) -> str:
    return (
        f"process {owner.get('pid')} (started by process {owner.get('launcher', [0])[0]}) on {owner.get('host')}, since "
        f"{owner.get('since')}"
    )
