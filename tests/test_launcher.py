"""The launcher's end: its status and its words, with real torchrun agents and ranks that do nothing but end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from aligner.launcher import _numa_options, _options

ROOT = Path(__file__).resolve().parent.parent
RANK = """
import os, signal, sys, time
from pathlib import Path
from aligner.health.process_exit import exit_process, temporary_folder

what, here, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
heard = []


def hear(number, frame):
    heard.append(number)
    if what == "deaf":
        return
    if what == "saves":
        time.sleep(0.5)
        exit_process(0)
    if what == "one cannot save":
        exit_process(rank)
    if what == "again" and len(heard) > 1:
        exit_process(130)


with temporary_folder():
    if what == "well":
        exit_process(0)
    if what == "fails":
        time.sleep(60 if rank else 0)
        sys.exit(5 if rank == 0 else 0)
    if what == "killed":
        time.sleep(60 if rank else 0)
        os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, hear)
    (here / f"ready{rank}").touch()
    time.sleep(60)
    time.sleep(60)
"""


MORE = pytest.mark.matrix


def launch(folder: Path, what: str, *options: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    (folder / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "aligner.launcher",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        "rank.py",
        what,
        ".",
    ]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ready(folder: Path) -> None:
    end = time.monotonic() + 60
    while not all((folder / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        pytest.param("well", 0, "", marks=MORE),
        ("fails", 5, "aligner: rank 0 ended with status 5."),
        pytest.param("killed", 137, "aligner: rank 0 ended by SIGKILL.", marks=MORE),
    ],
)
def test_an_end_by_itself(what: str, status: int, said: str, tmp_path: Path) -> None:
    job = launch(tmp_path, what)
    out, _ = job.communicate(timeout=90)
    assert (job.returncode, out.splitlines()) == (status, said.splitlines())
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("what", "number", "options", "status", "said"),
    [
        pytest.param("saves", signal.SIGINT, (), 0, "", marks=MORE),
        ("saves", signal.SIGTERM, (), 0, ""),
        pytest.param("saves", signal.SIGHUP, (), 0, "", marks=MORE),
        pytest.param(
            "saves", signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"), 0, "", marks=MORE
        ),
        pytest.param("one cannot save", signal.SIGTERM, (), 143, "", marks=MORE),
        pytest.param(
            "deaf", signal.SIGTERM, ("--shutdown-timeout=1",), 143,
            "aligner: SIGTERM: ranks were killed before they could save; the last complete checkpoint stays.", marks=MORE,
        ),
    ],
    ids=lambda value: str(getattr(value, "name", value)).replace(" ", "_")[:20],
)  # fmt: skip
def test_a_signal(
    what: str, number: signal.Signals, options: tuple[str, ...], status: int, said: str, tmp_path: Path
) -> None:
    job = launch(tmp_path, what, *options)
    ready(tmp_path)
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out.splitlines()) == (status, said.splitlines())
    assert list((tmp_path / "tmp").iterdir()) == []


@MORE
def test_a_second_interrupt_reaches_the_ranks(tmp_path: Path) -> None:
    """Not one that comes with the first, as from a terminal and a `timeout` between."""
    job = launch(tmp_path, "again")
    ready(tmp_path)
    job.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert job.poll() is None
    began = time.monotonic()
    job.send_signal(signal.SIGINT)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 130 and time.monotonic() - began < 20 and "Traceback" not in out
    assert list((tmp_path / "tmp").iterdir()) == []


@MORE
def test_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = launch(tmp_path, "saves")
    finally:
        signal.signal(signal.SIGHUP, before)
    ready(tmp_path)
    job.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out) == (0, "")


def test_options_end_where_the_program_begins() -> None:
    assert _options(["--standalone", "-m", "aligner.main", "--tee", "3"]) == ["--standalone"]
    assert _options(["--tee", "3", "train.py", "-r", "3"]) == ["--tee", "3"]
    assert _options(["--help"]) == ["--help"]


def test_ranks_on_gpus_stay_with_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node0").mkdir()
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/numactl" if name == "numactl" else None)
    monkeypatch.setenv("ALIGNER_DEVICE", "cuda")
    assert _numa_options(tmp_path) == [], "one node"
    (tmp_path / "node1").mkdir()
    assert _numa_options(tmp_path) == ["--numa-binding", "node"]
    parsed = parse_args([*_numa_options(tmp_path), "--numa-binding", "socket", "train.py"])
    assert parsed.numa_binding == "socket", "what is given counts"
    monkeypatch.setenv("ALIGNER_DEVICE", "cpu")
    assert _numa_options(tmp_path) == []
    monkeypatch.setenv("ALIGNER_DEVICE", "gpu")
    assert _numa_options(tmp_path) == [], "an error of the ranks"
    monkeypatch.delenv("ALIGNER_DEVICE")
    monkeypatch.setattr("aligner.spmd.device.cuda_build", lambda: "13.0")
    assert _numa_options(tmp_path) == ["--numa-binding", "node"], "torch's build says where ranks compute"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert _numa_options(tmp_path) == [], "numactl is not installed"
