"""launch/slurm.sbatch with two real torchrun agents on this host: only the scheduler (scontrol, srun) is simulated."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show config") echo "AuthInfo = socket=/run/munge.socket,cred_expire=600" ;;
    "show job") echo "   Command=(null)" ;;
    # more than a pipe holds, so that a reader who leaves after the first line is found out every time
    "show hostnames") for ((i = 0; i < 20000; i++)); do echo localhost; done ;;
    requeue*) echo "requeue $2" >>"$RECORD" ;;
esac
"""

SQUEUE = """#!/bin/bash
echo "${TIME_LEFT:-1-00:00:00}"
"""

SRUN = """#!/bin/bash
# One task per node, as srun starts them; signals go to every task; the status is the worst of theirs.
while [[ "$1" == --* ]]; do shift; done
tasks=()
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=localhost "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
while kill -0 "${tasks[@]}" 2>/dev/null; do wait "${tasks[@]}"; done
worst=0
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > worst)) && worst=$status; done
exit "$worst"
"""

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from aligner.health.process_exit import exit_process

folder, mode = Path(os.environ["RANKS_FOLDER"]), sys.argv[1]
rank = os.environ["RANK"]

def on_usr1(*_):
    (folder / f"usr1.{rank}").touch()
    exit_process(0)

signal.signal(signal.SIGUSR1, on_usr1)
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
nodes = os.environ["GROUP_WORLD_SIZE"]
(folder / f"rank.{rank}").write_text(f"{total.item()} {dist.get_world_size()} {nodes} {' '.join(sys.argv[1:])}")
if mode == "mode=fail" and rank == "3":
    print("rank 3 fails", file=sys.stderr)
    exit_process(1)  # as jobs end: the interpreter's own end aborts at times, while gloo's threads run
if mode == "mode=wait":
    time.sleep(120)
dist.barrier()
dist.destroy_process_group()
"""


LAUNCHER = """
import os, signal, sys
from pathlib import Path

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
for rank in range(2):
    (Path(os.environ["RANKS_FOLDER"]) / f"rank.{os.environ['SLURM_NODEID']}.{rank}").touch()
while True:
    signal.pause()
"""


def job_with_a_free_port() -> int:
    """A job number whose rendezvous port (10000 + job % 20000) nobody on this host listens on."""
    while True:
        job = random.randrange(1_000_000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 10000 + job % 20000)) != 0:
                return job


class Cluster:
    """A submit folder whose `aligner.main` adds up over all ranks, and a scheduler of two nodes that are both this host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "scontrol.log"
        self.job = job_with_a_free_port()
        (folder / "launch").mkdir()
        environment = (
            f'export VIRTUAL_ENV={sys.prefix} PATH="{sys.prefix}/bin:$PATH" ALIGNER_DEVICE="${{ALIGNER_DEVICE:-cpu}}"\n'
        )
        (folder / "launch" / "environment.sh").write_text(environment)
        (folder / "aligner").mkdir(parents=True)
        # the launcher is the real one
        (folder / "aligner" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'aligner')!r})\n")
        (folder / "aligner" / "main.py").write_text(PROGRAM)
        (folder / "aligner" / "preflight.py").write_text(f"print({str(folder / 'run')!r})\n")
        (folder / "bin").mkdir()
        for name, text in (("scontrol", SCONTROL), ("squeue", SQUEUE), ("srun", SRUN)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(stat.S_IRWXU)

    def without_torch(self) -> None:
        """Agents that only wait for USR1: for what the batch script decides by itself."""
        (self.folder / "aligner" / "launcher.py").write_text(LAUNCHER)

    def submit(self, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        """Start the batch script as slurmd would, in a session of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RANKS_FOLDER": str(self.folder),
            "RECORD": str(self.record),
            "OMP_NUM_THREADS": "1",
            "ALIGNER_DEVICE": "cpu",
            "ALIGNER_RANKS_PER_NODE": "2",
            "ALIGNER_RESTARTS": "0",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": "localhost[1-2]",
            "SLURM_NNODES": "2",
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), *overrides], cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def ranks(self) -> list[str]:
        """What each rank wrote after its all-reduce."""
        return [path.read_text() for path in sorted(self.folder.glob("rank.*"))]

    def requeued(self) -> bool:
        return self.record.exists()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def end(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Exit status and output; a job over its limit goes with all its ranks."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"no end within {seconds} s: {process.communicate()[0][-3000:]}")
    return process.returncode, out


def test_two_nodes_meet_and_every_rank_gets_the_overrides(cluster: Cluster) -> None:
    status, out = end(cluster.submit("mode=sum", "run_dir='a b'"))
    assert status == 0, out
    # 1 + 2 + 3 + 4 over a world of 4 ranks on 2 nodes
    assert cluster.ranks() == ["10 4 2 mode=sum run_dir='a b'"] * 4
    assert not cluster.requeued()


def wait_for_ranks(cluster: Cluster, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while len(cluster.ranks()) < 4:
        assert time.monotonic() < limit
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def test_usr1_reaches_every_rank_and_the_job_queues_again(cluster: Cluster) -> None:
    process = cluster.submit("mode=wait")
    wait_for_ranks(cluster, process)
    # as --signal=B:USR1 does: to the batch shell alone
    (cluster.folder / "run" / "checkpoints" / "step-00000012").mkdir(parents=True)
    process.send_signal(signal.SIGUSR1)
    status, out = end(process)
    assert status == 0, out
    assert len(list(cluster.folder.glob("usr1.*"))) == 4, out
    assert cluster.requeued(), out
    assert cluster.record.read_text() == f"requeue {cluster.job}\n"
    then = datetime.now() + timedelta(seconds=601)  # cred_expire of the cluster, and a second
    times = {(then - timedelta(seconds=seconds)).strftime("%H:%M") for seconds in (0, 30)}
    assert out.splitlines()[-1] in {f"slurm.sbatch: saved after step 12; queued again, starts after {t}" for t in times}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TIME_LEFT": "4:30"}, "so that --time leaves none for work"),
        ({"SLURM_RESTART_COUNT": "1"}, "no step was saved since the start (the newest is step 8)"),
    ],
    ids=["a time limit below the warning", "twice without a step"],
)
def test_a_job_that_would_never_get_further_is_not_queued_again(
    cluster: Cluster, variables: dict[str, str], says: str
) -> None:
    cluster.without_torch()
    (cluster.folder / "run" / "checkpoints" / "step-00000008").mkdir(parents=True)
    process = cluster.submit("mode=wait", **variables)
    wait_for_ranks(cluster, process)
    process.send_signal(signal.SIGUSR1)
    status, out = end(process)
    assert status == 75, out
    assert not cluster.requeued()
    assert says in out.splitlines()[-1] and "not queued again" in out.splitlines()[-1]


def test_a_warning_before_the_ranks_have_started(cluster: Cluster) -> None:
    cluster.without_torch()
    checked = cluster.folder / "checked"
    check = f"import pathlib, time; pathlib.Path({str(checked)!r}).touch(); time.sleep(2); print({str(cluster.folder / 'run')!r})"
    (cluster.folder / "aligner" / "preflight.py").write_text(check)
    process = cluster.submit("mode=wait", TIME_LEFT="3:00")
    limit = time.monotonic() + 60
    while not checked.exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    status, out = end(process)
    assert status == 75, out
    assert not cluster.requeued() and cluster.ranks() == []
    first, second = out.splitlines()
    assert first == "slurm.sbatch: USR1 before the ranks have started"
    assert second.startswith("slurm.sbatch: nothing was saved; not queued again: the warning came")


def test_one_task_of_an_array_is_queued_again(cluster: Cluster) -> None:
    cluster.without_torch()
    process = cluster.submit("mode=wait", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3")
    wait_for_ranks(cluster, process)
    process.send_signal(signal.SIGUSR1)
    end(process)
    assert cluster.record.read_text() == "requeue 77_3\n"


def test_a_signal_at_the_last_step_queues_nothing(cluster: Cluster) -> None:
    cluster.without_torch()
    (cluster.folder / "run").mkdir()
    (cluster.folder / "run" / ".launch").write_text('{"launch": "slurm 7.1", "finished": 12}')
    process = cluster.submit("mode=wait")
    wait_for_ranks(cluster, process)
    process.send_signal(signal.SIGUSR1)
    status, out = end(process)
    assert status == 0, out
    assert not cluster.requeued()


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    status, out = end(cluster.submit("mode=fail"))
    assert status == 1, out
    assert "rank 3 fails" in out
    assert "ChildFailedError" not in out, "torchrun tells it again"
    assert not cluster.requeued()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ALIGNER_RANKS_PER_NODE": "", "SLURM_GPUS_ON_NODE": ""}, "--gpus-per-node N"),
        ({"ALIGNER_DEVICE": "cuda", "SLURM_GPUS_ON_NODE": "1"}, "2 ranks per node and 1 GPUs on each"),
        ({"ALIGNER_DEVICE": "", "SLURM_GPUS_ON_NODE": "2"}, "is a cpu build, and this job has 2 GPUs per node"),
        ({"SLURM_HET_SIZE": "2"}, "a heterogeneous job"),
        ({"SLURM_JOB_ID": ""}, "on one machine use launch/local.sh"),
    ],
    ids=["no number of ranks", "more ranks than GPUs", "CPU build on GPUs", "heterogeneous", "no job"],
)
def test_what_cannot_work_is_refused_in_one_line(cluster: Cluster, variables: dict[str, str], says: str) -> None:
    status, out = end(cluster.submit("mode=sum", **variables))
    assert status == 2, out
    assert len(out.splitlines()) == 1 and out.startswith("slurm.sbatch: error: ") and says in out
    assert cluster.ranks() == []
