"""One job at a time in a folder: with real processes on this host, and as another host's would look."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner.checkpoint import lease as leases
from aligner.checkpoint.convert import convert
from aligner.checkpoint.lease import FILE, acquire_lease, check_free
from aligner.health.process_identity import identify
from tests.models.tiny import save_tiny

HOLDER = """
import sys, time
from pathlib import Path
from aligner.checkpoint.lease import acquire_lease
try:
    held = acquire_lease(Path(sys.argv[1]), sys.argv[2])
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.readline()
held.release()
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """hold(launch="a"): a process that holds tmp_path until a line comes; its first word has been read."""
    started: list[subprocess.Popen[str]] = []

    def start(launch: str = "a") -> subprocess.Popen[str]:
        one = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), launch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        assert one.stdout is not None
        one.word = one.stdout.readline().strip()  # type: ignore[attr-defined]
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()


def elsewhere(folder: Path, **changes: Any) -> Path:
    """The lease of a job on another host, as it would be read here."""
    content = {"id": "theirs", "host": "node7", "machine": "node7/boot/ns", "pid": 4711, "started": 5, "launcher": [4700, 4],
               "launch": "slurm 9.0", "since": "2026-11-29T10:00:00+00:00", **changes}  # fmt: skip
    (folder / FILE).write_text(json.dumps(content))
    return folder / FILE


def test_a_second_job_is_refused_with_the_owner_named(hold: Hold, tmp_path: Path) -> None:
    first = hold()
    for launch in ("b", "a"):  # the same launch too: two jobs in one shell of an allocation are not a restart
        second = hold(launch)
        said = second.word
        assert second.wait(10) == 2
        assert f"run_dir={tmp_path} is in use by another job: process {first.pid} " in said
        assert f"on {os.uname().nodename}, since 20" in said and "choose another run_dir" in said
    with pytest.raises(ValueError, match=f"in use by another job: process {first.pid} "):
        check_free(tmp_path)
    first.communicate("done\n")
    assert not (tmp_path / FILE).exists()
    assert hold().word == "held"


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "stopped before"])
def test_what_a_killed_job_held_is_free_at_once(stopped: bool, hold: Hold, tmp_path: Path) -> None:
    first = hold()
    if stopped:  # it lives, whatever its lease's age
        first.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / FILE, (1, 1))
        assert hold().word.startswith("run_dir=")
    first.kill()
    first.wait()
    began = time.monotonic()
    acquire_lease(tmp_path, "b").release()
    assert time.monotonic() - began < leases.STALE
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    me = identify()
    elsewhere(tmp_path, machine=leases.machine_id(), pid=me.pid, started=me.started + 1)
    acquire_lease(tmp_path, "b").release()


def test_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Also where a dead job's lease lies there and all of them find it."""
    elsewhere(tmp_path, machine=leases.machine_id(), pid=2**22 + 1)
    jobs = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), str(number)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for number in range(6)
    ]  # fmt: skip
    words = [job.stdout.readline() for job in jobs if job.stdout]
    for job in jobs:
        job.communicate("done\n")
    assert sorted(word[:4] for word in words) == ["held", *["run_"] * 5]


def test_another_host_is_judged_by_whether_its_lease_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks do not matter: the living one's hour is wrong, the dead one's is of this moment."""
    monkeypatch.setattr(leases, "STALE", 1.5)
    file = elsewhere(tmp_path)
    beats = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time\nt = time.time() + 7200\nwhile True: os.utime(sys.argv[1], (t, t)); "
         "t += 1; time.sleep(0.2)", str(file)]
    )  # fmt: skip
    try:
        time.sleep(0.5)
        with pytest.raises(
            ValueError, match=r"process 4711 \(started by process 4700\) on node7, since 2026-11-29T10:00:00"
        ):
            acquire_lease(tmp_path, "slurm 10.0")
    finally:
        beats.kill()
        beats.wait()
    os.utime(file)
    began = time.monotonic()
    held = acquire_lease(tmp_path, "slurm 10.0")
    assert time.monotonic() - began > 1.4
    held.release()


def test_a_requeued_job_does_not_wait_for_its_other_host(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    began = time.monotonic()
    acquire_lease(tmp_path, "slurm 9.0").release()
    assert time.monotonic() - began < leases.STALE


def test_an_old_lease_needs_no_look(tmp_path: Path) -> None:
    """Four times as old as a living one can be, by the file server's own clock."""
    file = elsewhere(tmp_path)
    old = time.time() - 5 * leases.STALE
    os.utime(file, (old, old))
    began = time.monotonic()
    acquire_lease(tmp_path, "another").release()
    assert time.monotonic() - began < leases.STALE


def test_an_owner_notices_that_it_was_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_PERIOD", 0.05)
    held = acquire_lease(tmp_path, "a")
    age = (tmp_path / FILE).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / FILE).stat().st_mtime_ns > age and not held.lost, "it is renewed"
    elsewhere(tmp_path)
    time.sleep(0.3)
    assert "process 4711" in held.lost
    held.release()
    assert (tmp_path / FILE).exists(), "it is not ours to remove"


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    held = acquire_lease(tmp_path, "a")
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_converted_into_a_living_run(hold: Hold, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "source")
    first = hold()
    for out in ("model", "exports/step_5"):
        with pytest.raises(ValueError, match=f"process {first.pid} "):
            convert(model, tmp_path / out, None)
    first.communicate("done\n")
    convert(model, tmp_path / "model", None)
