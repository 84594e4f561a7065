"""launch/slurm.sbatch on a real Slurm of two nodes (slurm_cluster.sh), with whole jobs: `pytest -m slurm`, 14 minutes on 2 cores.

Jobs that save, die or move end with the metrics and weights of the undisturbed one, to the last bit; each message as a user sees it.
What only the batch script decides runs with a program in place of aligner.main that says how it was started.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aligner.data.column_addition import main as write_task

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")

RULE = """
import subprocess, sys, time
def digits(prompt, response):
    time.sleep(0.02)
    if len(response) % 8 == 0:  # a program that a signal to the whole job may end
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(0.2)"], check=True)
    return sum(map(str.isdigit, response)) / max(1, len(response))
"""

STAND_IN = r"""
import os, signal, sys, time
from aligner.real_main import main as real_main, parse

def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if "RANK" not in os.environ:
        return real_main(arguments) if "seed=1" in arguments else None
    said = [os.environ[name] for name in ("SLURM_NODEID", "LOCAL_RANK", "WORLD_SIZE")]
    said = " ".join(["RANK", *said, os.environ.get("CUDA_VISIBLE_DEVICES", "-"), os.getcwd()])
    os.write(1, f"{said}\n".encode())  # at once: the ranks share the log
    if "seed=7" in arguments:
        time.sleep(2 * int(os.environ["LOCAL_RANK"]))
        sys.exit(7)
    if "seed=2" in arguments:
        signal.signal(signal.SIGUSR1, lambda *_: end())
        os.write(1, b"READY\n")
        time.sleep(200)

def end():
    from aligner.health.process_exit import exit_process
    exit_process(0)

if __name__ == "__main__":
    main()
"""


def missing() -> str:
    """Why there can be no cluster here."""
    programs = [name for name in NEEDED if shutil.which(name) is None]
    if programs:
        return f"{', '.join(programs)} missing: apt-get install -y --no-install-recommends slurm-wlm munge iproute2"
    if os.geteuid():
        return "needs root"
    tried = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else ""


# Generous: a busy machine is no failing test.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


class Cluster:
    """The cluster, and a checkout with an environment of its own for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "s"
        self.state.mkdir()
        self.checkout, self.stand_in = folder / "checkout", folder / "stand in"
        for checkout in (self.checkout, self.stand_in):
            for part in ("launch", "conf", "aligner"):
                shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", checkout)
            _make_environment(checkout)
        main = self.stand_in / "aligner" / "main.py"
        main.rename(main.with_name("real_main.py"))
        main.write_text(STAND_IN)
        (folder / "rule.py").write_text(RULE)
        write_task(["--out", str(folder / "task")])
        self.call("start", seconds=60)

    def call(self, what: str, *words: str, cwd: Path | None = None, seconds: float = 30) -> str:
        names = ("PATH", "HOME", "LANG")  # a user's shell, without this test's environment
        environment = {name: os.environ[name] for name in names if name in os.environ}
        done = subprocess.run(
            ["bash", str(SCRIPT), what, str(self.state), *words],
            cwd=cwd or self.checkout, env=environment, text=True, capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{what} {words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def overrides(self, run: str, *more: str) -> list[str]:
        return [
            "--config-name", "quickstart", f"model.path={self.folder}/task/model", "train.eval_every=0",
            f"data.path={self.folder}/task/prompts.jsonl", f"run_dir={self.folder}/runs/{run}", "checkpoint.every=2",
            f"reward.rule={self.folder}/rule.py:digits", "logging.console=false", "hang.dead_seconds=15", *more,
        ]  # fmt: skip

    def submit(
        self, run: str, *overrides: str, options: tuple[str, ...] = (), ranks: str = "1", cwd: Path | None = None
    ) -> Job:
        checkout = cwd or self.checkout
        script = checkout / "launch" / "slurm.sbatch"
        script = script if script.exists() else self.checkout / "launch" / "slurm.sbatch"
        exported = f"ALL,ALIGNER_DEVICE=cpu,ALIGNER_RANKS_PER_NODE={ranks}"
        log = self.folder / f"{run}.out"
        given = ["sbatch", "--parsable", "--output", str(log), "--export", exported, *options, str(script)]
        return Job(
            self, self.call("run", *given, *self.overrides(run, *overrides), cwd=cwd), self.folder / "runs" / run, log
        )


def _make_environment(checkout: Path) -> None:
    """A finished .venv that borrows its packages from this one."""
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next((venv / "lib").glob("python*/site-packages"))
    theirs = next(Path(sys.prefix, "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{theirs}\n")
    digest = hashlib.sha256((checkout / "pyproject.toml").read_bytes()).hexdigest()
    version = ".".join(map(str, sys.version_info[:3]))
    (venv / "aligner.stamp").write_text(f"device=cpu\npython={version}\npath={venv}\npyproject={digest}\n")


class Job:
    """One job of the cluster."""

    def __init__(self, cluster: Cluster, number: str, run_dir: Path, log: Path) -> None:
        self.cluster, self.number, self.run_dir, self.log = cluster, number, run_dir, log

    def scontrol(self, *words: str) -> str:
        return self.cluster.call("run", "scontrol", *words)

    def state(self) -> str:
        return self.cluster.call("run", "squeue", "-h", "-j", self.number, "-t", "all", "-o", "%T").split("\n")[0]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, happened: Callable[[], Any], seconds: float = 900) -> Any:
        end = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < end, f"waited in vain; {self.state()}: {self.said()[-3000:]}"
            time.sleep(0.2)
        return found

    def until_step(self, step: int) -> None:
        self.until(lambda: len(self.rows()) >= step)

    def end(self, seconds: float = 900) -> str:
        """Its state and exit status, as `COMPLETED 0`."""
        self.until(lambda: self.state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), seconds)
        found = self.scontrol("show", "job", self.number)
        code = re.search(r"ExitCode=(\d+):", found)
        assert code
        return f"{self.state()} {code[1]}"

    def warn(self) -> None:
        """As --signal=B:USR1 does: to the batch shell alone."""
        self.cluster.call("run", "scancel", "--signal=USR1", "--batch", self.number)

    def start_now(self) -> None:
        """A job that was queued again waits for two minutes, so that credentials of its first start are not revoked for the next."""
        self.until(lambda: self.state() == "PENDING")
        time.sleep(3)
        self.scontrol("update", f"jobid={self.number}", "StartTime=now")

    def rank_process(self, rank: int) -> int:
        """As this machine numbers it."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(one.partition("=")[::2] for one in (folder / "environ").read_text().split("\0"))
                words = (folder / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            mine = variables.get("SLURM_JOB_ID") == self.number and variables.get("RANK") == str(rank)
            if mine and "aligner.main" in words and "multiprocessing" not in " ".join(words):
                return int(folder.name)
        raise AssertionError(f"no process of rank {rank}")

    def rows(self) -> list[dict[str, Any]]:
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def result(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Metrics without what depends on the clock and on memory; a digest of each file of weights."""
        timed = re.compile(r"seconds|per_second|time|gib|bytes|memory|utc|idle|rate|hidden|sync", re.IGNORECASE)
        rows = [{name: value for name, value in row.items() if not timed.search(name)} for row in self.rows()]
        files = sorted((self.run_dir / "model").glob("*.safetensors"))
        return rows, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="sl")).resolve()  # not tmp_path: a socket's path has 108 characters
    folder.chmod(0o755)  # munged looks at the folders above its socket
    made = None
    try:
        made = Cluster(folder)
        yield made
    finally:
        if made is not None:
            made.call("stop")
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Any:
    job = cluster.submit("undisturbed", "train.steps=5")
    assert job.end() == "COMPLETED 0", job.said()
    found = job.result()
    assert len(found[0]) == 5 and found[1]
    assert len({row["reward"] for row in found[0]}) == 5 and not any(row.get("failed") for row in found[0])
    return found


def test_the_warning_saves_and_queues_again(cluster: Cluster, undisturbed: Any) -> None:
    job = cluster.submit("warned", "train.steps=5")
    job.until_step(1)
    time.sleep(1)  # in the middle of scoring
    job.warn()
    job.start_now()
    said = job.said()
    saved = re.search(r"SIGUSR1: saved after step (\d)", said)
    assert saved, said
    assert re.search(
        rf"^slurm.sbatch: saved after step {saved[1]}; queued again, starts after \d\d:\d\d$", said, re.MULTILINE
    )
    for noise in ("Traceback", "KeyError", "STEP CANCELLED", "SignalException", "resource_tracker", "failed"):
        assert noise not in said, said
    assert len(said.splitlines()) < 12, said
    assert job.end() == "COMPLETED 0", job.said()
    assert f"going on after step {saved[1]}" in job.said()
    assert job.result() == undisturbed


def last(said: str) -> str:
    return said.rstrip().splitlines()[-1]


def test_a_cancelled_job_saves_and_the_same_command_goes_on(cluster: Cluster, undisturbed: Any) -> None:
    job = cluster.submit("cancelled", "train.steps=5")
    job.until_step(1)
    time.sleep(1)
    cluster.call("run", "scancel", job.number)
    assert job.end().startswith("CANCELLED")
    assert "SIGTERM: saved after step" in job.said(), job.said()
    again = cluster.submit("cancelled", "train.steps=5")
    assert again.end() == "COMPLETED 0", again.said()
    assert again.result() == undisturbed


def test_requeue_by_hand(cluster: Cluster, undisturbed: Any) -> None:
    job = cluster.submit("requeued", "train.steps=5")
    job.until_step(3)
    job.scontrol("requeue", job.number)
    job.start_now()
    assert job.end() == "COMPLETED 0", job.said()
    assert job.result() == undisturbed


def test_a_node_that_loses_its_power(cluster: Cluster, undisturbed: Any) -> None:
    job = cluster.submit("crashed", "train.steps=5")
    job.until_step(3)
    cluster.call("crash", "2")
    try:
        job.until(lambda: job.state() in ("PENDING", "FAILED", "NODE_FAIL", "COMPLETED"))
    finally:
        cluster.call("boot", "2")
    if job.state() == "PENDING":  # Slurm's own requeue
        job.start_now()
    else:
        job = cluster.submit("crashed", "train.steps=5")
    assert job.end() == "COMPLETED 0", job.said()
    assert job.result() == undisturbed


@pytest.mark.parametrize("attempt", range(4))
def test_the_report_of_a_rank_that_died_on_another_node(cluster: Cluster, attempt: int) -> None:
    job = cluster.submit(f"dead{attempt}", "train.steps=500")
    job.until_step(1)
    os.kill(job.rank_process(1), signal.SIGKILL)
    assert job.end() == "FAILED 137", job.said()
    assert "aligner: rank 1 ended by SIGKILL." in job.said()
    assert re.search(r"aligner: error: rank 1 has been silent for \d+ s \(hang.dead_seconds\)", job.said())
    reports = list((job.run_dir / "faults").glob("*.txt"))
    assert len(reports) == 1 and "rank 1 has been silent" in reports[0].read_text()


def test_restarts_after_a_death(cluster: Cluster, undisturbed: Any) -> None:
    options = ("--export", "ALL,ALIGNER_DEVICE=cpu,ALIGNER_RANKS_PER_NODE=1,ALIGNER_RESTARTS=2")
    job = cluster.submit("restarted", "train.steps=5", options=options)
    job.until_step(3)
    os.kill(job.rank_process(1), signal.SIGKILL)
    assert job.end() == "COMPLETED 0", job.said()
    assert job.result() == undisturbed


def test_a_wrong_override_is_the_only_line(cluster: Cluster) -> None:
    job = cluster.submit("wrong", "train.stepz=3")
    assert job.end() == "FAILED 2"
    said = job.said().splitlines()
    assert len(said) == 1 and said[0].startswith("aligner: error: train.stepz=3: there is no setting train.stepz")


# From here on with the program that says how it was started.

GPUS = {
    "none asked for": ((), "", 2),
    "fewer": (("--gpus-per-node", "1"), "", 1),
    "gres": (("--gres", "gpu:2"), "", 2),
    "fewer by gres": (("--gres", "gpu:1"), "", 1),
    "by task": (("--gpus-per-task", "1", "--ntasks-per-node", "2"), "", 2),
    "in all": (("--gpus", "4"), "", 2),
    "two tasks": (("--ntasks-per-node", "2"), "", 2),
    "ranks by number": (("--gpus-per-node", "2"), "1", 1),
}


def as_cuda(cluster: Cluster) -> Path:
    """A checkout whose environment says that it is a CUDA build."""
    checkout = cluster.folder / "cuda"
    if not checkout.exists():
        shutil.copytree(cluster.stand_in, checkout, symlinks=True)
        stamp = checkout / ".venv" / "aligner.stamp"
        stamp.write_text(re.sub("device=cpu", "device=cuda", stamp.read_text()).replace("/stand in/", "/cuda/"))
    return checkout


@pytest.mark.parametrize("case", GPUS)
def test_one_rank_for_each_gpu_of_the_step(cluster: Cluster, case: str) -> None:
    options, ranks, count = GPUS[case]
    options = (*options, "--export", f"ALL,ALIGNER_RANKS_PER_NODE={ranks}")
    job = cluster.submit(f"gpus {case}".replace(" ", "_"), "seed=3", options=options, cwd=as_cuda(cluster))
    assert job.end() == "COMPLETED 0", job.said()
    said = sorted(line.split()[1:4] for line in job.said().splitlines() if line.startswith("RANK"))
    assert said == [[str(node), str(rank), str(2 * count)] for node in (0, 1) for rank in range(count)]
    seen = {line.split()[4] for line in job.said().splitlines() if line.startswith("RANK")}
    assert all(len(devices.split(",")) >= count for devices in seen), "ranks share a GPU"


def test_more_ranks_than_gpus_and_none_at_all(cluster: Cluster) -> None:
    refused = {
        "two ranks": (
            ("--gpus-per-node", "1", "--export", "ALL,ALIGNER_RANKS_PER_NODE=2"),
            "2 ranks per node and 1 GPUs",
        ),
        "no GPU": (("--gpus-per-node", "0", "--export", "ALL"), "the number of ranks per node is unknown"),
    }
    for name, (options, says) in refused.items():
        job = cluster.submit(name.replace(" ", "_"), "seed=3", options=options, cwd=as_cuda(cluster))
        assert job.end() == "FAILED 2"
        assert len(job.said().splitlines()) == 1 and says in job.said(), job.said()


def test_a_forgotten_device_keeps_the_environment(cluster: Cluster) -> None:
    options = ("--export", "ALL,ALIGNER_DEVICE=cuda,ALIGNER_RANKS_PER_NODE=1")
    job = cluster.submit("device", "seed=3", options=options, cwd=cluster.stand_in)
    assert job.end() == "FAILED 2"
    assert (
        len(job.said().splitlines()) == 1 and "is a cpu build, and ALIGNER_DEVICE=cuda asks for another" in job.said()
    )
    assert (cluster.stand_in / ".venv" / "aligner.stamp").exists()
    # CPUs without a word about the device: the environment's own
    options = ("--gpus-per-node", "0", "--export", "ALL,ALIGNER_RANKS_PER_NODE=2")
    job = cluster.submit("device_unset", "seed=3", options=options, cwd=cluster.stand_in)
    assert job.end() == "COMPLETED 0", job.said()


def test_two_tasks_per_node_are_one_agent(cluster: Cluster) -> None:
    options = ("--ntasks-per-node=2",)
    job = cluster.submit("tasks", "seed=3", options=options, ranks="2", cwd=cluster.stand_in)
    assert job.end() == "COMPLETED 0", job.said()
    said = sorted(line.split()[1:4] for line in job.said().splitlines() if line.startswith("RANK"))
    assert said == [["0", "0", "4"], ["0", "1", "4"], ["1", "0", "4"], ["1", "1", "4"]]


def test_the_exit_status_is_the_jobs_own(cluster: Cluster) -> None:
    job = cluster.submit("seven", "seed=7", cwd=cluster.stand_in)
    assert job.end() == "FAILED 7", job.said()
    assert "Traceback" not in job.said() and "aligner: rank " in job.said()


def test_one_task_of_an_array_is_queued_again(cluster: Cluster) -> None:
    options = ("--nodes=1", "--array=1-2")
    job = cluster.submit("array_%a", "seed=2", options=options, cwd=cluster.stand_in)
    logs = [job.log.with_name(f"array_{task}.out") for task in (1, 2)]
    job.until(lambda: all(log.exists() and "READY" in log.read_text() for log in logs))
    (job.run_dir / "checkpoints" / "step-00000003").mkdir(parents=True)

    def states() -> dict[str, str]:
        lines = cluster.call("run", "squeue", "-h", "-r", "-j", job.number, "-t", "all", "-o", "%K %T").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    cluster.call(
        "run", "scancel", "--signal=USR1", "--batch", f"{job.number}_2"
    )  # the last one's number is the whole array's
    job.until(lambda: states()["2"] == "PENDING")
    assert states()["1"] == "RUNNING"
    assert "saved after step 3; queued again, starts after" in logs[1].read_text()
    cluster.call("run", "scancel", job.number)
    job.until(lambda: set(states().values()) == {"CANCELLED"})


def test_a_time_limit_below_the_warning_is_not_queued_for_ever(cluster: Cluster) -> None:
    job = cluster.submit("short", "seed=2", options=("--time=4",), cwd=cluster.stand_in)
    assert job.end() == "FAILED 75", job.said()
    assert "so that --time leaves none for work" in last(job.said()) and "not queued again" in last(job.said())


def test_from_another_folder(cluster: Cluster) -> None:
    elsewhere = cluster.folder / "elsewhere"
    elsewhere.mkdir()
    script = cluster.stand_in / "launch" / "slurm.sbatch"
    (elsewhere / "launch").mkdir()
    given = [
        "sbatch",
        "--parsable",
        "--output",
        "%j.out",
        "--export",
        "ALL,ALIGNER_RANKS_PER_NODE=1",
        "--gpus-per-node=0",
    ]
    number = cluster.call("run", *given, str(script), *cluster.overrides("elsewhere", "seed=3"), cwd=elsewhere)
    job = Job(cluster, number, cluster.folder / "runs" / "elsewhere", elsewhere / f"{number}.out")
    assert job.end() == "COMPLETED 0", job.said()
    assert f"RANK 0 0 2 - {elsewhere}" in job.said()
    copied = elsewhere / "mine.sbatch"
    shutil.copy(script, copied)
    number = cluster.call("run", *given, str(copied), *cluster.overrides("elsewhere", "seed=3"), cwd=elsewhere)
    job = Job(cluster, number, cluster.folder / "runs" / "elsewhere", elsewhere / f"{number}.out")
    assert job.end() == "FAILED 2"
    assert len(job.said().splitlines()) == 1 and "there is no checkout of aligner on node1" in job.said()


def test_a_node_without_the_environment_says_so(cluster: Cluster) -> None:
    cluster.call("node", "2", "mount", "-t", "tmpfs", "none", str(cluster.stand_in / ".venv"))
    try:
        job = cluster.submit("no_venv", "seed=3", cwd=cluster.stand_in)
        assert job.end() == "FAILED 2"
    finally:
        cluster.call("node", "2", "umount", str(cluster.stand_in / ".venv"))
    said = [line for line in job.said().splitlines() if not line.startswith("srun: ")]
    assert len(said) == 1, job.said()
    assert said[0].startswith(
        f"slurm.sbatch: error: node2: there is no finished environment in {cluster.stand_in}/.venv"
    )


def test_a_node_without_the_checkout_says_so(cluster: Cluster) -> None:
    empty = cluster.folder / "empty"
    empty.mkdir(exist_ok=True)
    cluster.call("node", "2", "mount", "--bind", str(empty), str(cluster.stand_in))
    try:
        job = cluster.submit("no_checkout", "seed=3", cwd=cluster.stand_in)
        assert job.end() == "FAILED 2"
    finally:
        cluster.call("node", "2", "umount", str(cluster.stand_in))
    assert "slurm.sbatch: error: node2: there is no checkout in" in job.said()


def test_a_heterogeneous_job_is_refused(cluster: Cluster) -> None:
    log = cluster.folder / "het.out"
    given = ["sbatch", "--parsable", "--output", str(log), "--nodes=1", ":", "--nodes=1"]
    script = str(cluster.stand_in / "launch" / "slurm.sbatch")
    number = cluster.call("run", *given, script, *cluster.overrides("het", "seed=3"), cwd=cluster.stand_in)
    job = Job(cluster, number.split("+")[0].split(";")[0], cluster.folder / "runs" / "het", log)
    assert job.end() == "FAILED 2"
    assert len(job.said().splitlines()) == 1 and "a heterogeneous job" in job.said()


def test_a_taken_port_is_left_alone(cluster: Cluster) -> None:
    number = int(cluster.submit("before_port", "seed=3", cwd=cluster.stand_in).number) + 1
    program = f"import socket, time; s = socket.create_server(('', {10000 + number % 20000})); time.sleep(60)"
    holder = subprocess.Popen(
        ["bash", str(SCRIPT), "node", str(cluster.state), "1", sys.executable, "-S", "-c", program]
    )
    try:
        job = cluster.submit("port", "seed=3", cwd=cluster.stand_in)
        assert job.number == str(number)
        assert job.end() == "COMPLETED 0", job.said()
    finally:
        holder.kill()
        holder.wait()
