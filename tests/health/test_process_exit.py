"""Temporary files of a process go with it, however it ends; nobody else's do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aligner.health import process_exit
from aligner.health.process_identity import GONE, RUNNING, Process, identify

HEAD = """
import os, signal, sys, tempfile, time
from aligner.health.process_exit import exit_on_signal, exit_process, temporary_folder
signal.signal(signal.SIGINT, exit_on_signal)
with temporary_folder() as folder:
    keep = tempfile.mkdtemp()
    assert os.path.dirname(keep) == os.environ["TMPDIR"] == str(folder)
"""
ENDS = {
    "the block's end": ("    pass", 0),
    "end": ("    exit_process(7)", 7),
    "an error": ("    sys.exit(3)", 3),
    "a signal": ("    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130),
    "SIGKILL": ("    os.kill(os.getpid(), signal.SIGKILL)", -9),
}


def run(tmp: Path, ending: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + ending], env={**os.environ, "TMPDIR": str(tmp), **environment},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    ending, status = ENDS[how]
    logs = tmp_path / "torchelastic_x" / "id_y" / "attempt_0"
    for rank in (0, 1):
        (logs / str(rank)).mkdir(parents=True)
    done = run(tmp_path, ending, TORCHELASTIC_ERROR_FILE=str(logs / "0" / "error.json"), RANK="0")
    assert done.returncode == status, done.stderr
    if how == "SIGKILL":
        assert len(list(tmp_path.glob("aligner-*"))) == 1
        run(tmp_path, "    pass", TORCHELASTIC_ERROR_FILE=str(logs / "0" / "error.json"))  # the next one removes it
    assert list(tmp_path.iterdir()) == []
    said = "aligner: SIGINT: exited before training began; nothing was changed.\n"
    assert done.stderr == (said if how == "a signal" else "")


def test_what_is_somebody_elses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living process's folder, another machine's (a container that shares /tmp), a log that torchrun was asked for."""
    me = identify()
    theirs = [
        tmp_path / f"aligner-{process_exit._here()}-{me.pid}-{me.started}-abc",
        tmp_path / f"aligner-00000000-{2**22 + 1}-5-abc",
        tmp_path / "aligner-notes",
    ]
    log = tmp_path / "torchelastic_x" / "id" / "attempt_0" / "0" / "stdout.log"
    for folder in (*theirs, log.parent):
        folder.mkdir(parents=True)
    log.write_text("said")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(log.with_name("error.json")))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with process_exit.temporary_folder() as folder:
        assert folder is not None and folder.parent == tmp_path
    assert os.environ["TMPDIR"] == str(tmp_path) and tempfile.gettempdir() == str(tmp_path)
    assert all(folder.exists() for folder in theirs) and log.read_text() == "said"


def test_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with process_exit.temporary_folder() as folder:
        assert folder is None and tempfile.gettempdir() == str(tmp_path / "gone")


def test_a_process_is_known_by_its_start() -> None:
    me = identify()
    assert me.state() == RUNNING
    assert Process(me.pid, me.started + 1).state() == GONE
