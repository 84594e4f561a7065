"""metrics.jsonl survives a kill, is strictly JSON, and wandb never stops a training."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligner.report.config import WandbConfig
from aligner.report.metrics import MetricsWriter, capture_environment, read_metrics

WANDB_JOB = """
import sys
from aligner.report.config import WandbConfig
from aligner.report.metrics import MetricsWriter
with MetricsWriter(sys.argv[1], console=True, wandb=WandbConfig(sys.argv[2], "proj", None)) as writer:
    writer.log(1, {"reward": 0.123456789, "kl": float("nan")})
    writer.log(2, {"reward": 0.25})
"""


def strict(line: str) -> dict[str, object]:
    """As a parser does that knows no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_each_line_is_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.log(3, {"a": math.nan, "b": -math.inf, "c": torch.tensor(0.5), "d": 7, "e": True, "f": None})
        row = strict(writer.path.read_text())
    time = row.pop("time")
    assert isinstance(time, float)
    assert time > 1.6e9
    assert row == {"step": 3, "a": None, "b": None, "c": 0.5, "d": 7, "e": 1.0, "f": None}


def test_rows_before_a_kill_are_kept_and_the_next_life_appends(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from aligner.report.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], console=False)\n"
        "for step in range(1, 4): writer.log(step, {'reward': float(step)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')  # the row that the kill cut
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.log(3, {"reward": 30.0})
        writer.log(4, {"reward": 4.0})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 4.0)]


def test_an_evaluation_logged_apart_joins_the_row_of_its_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.log(1, {"reward": 0.5})
        writer.log(1, {"accuracy": 0.25})
    (row,) = read_metrics(tmp_path)
    assert (row["reward"], row["accuracy"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "no complete row"),
        ('{"step": 1}\n{"step": \n{"step": 3}\n', r"metrics\.jsonl:2 is not a JSON object"),
        ("[1]\n", r"metrics\.jsonl:1 is not"),
        ('{"reward": 1}\n', r"metrics\.jsonl:1 is not"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "many"}, "metric 'text' is 'many', not a number"),
        ({"two": torch.zeros(2)}, "metric 'two'"),
        ({"step": 1}, "must not be named 'step'"),
    ],
)
def test_a_metric_that_is_none_is_named(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with MetricsWriter(tmp_path, console=False) as writer, pytest.raises(ValueError, match=message):
        writer.log(1, row)


def test_the_environment_is_written_at_the_start(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, console=False).close()
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found == capture_environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    # a CUDA build from the package index names its CUDA (+cu130) in the module only
    assert torch.__version__.startswith(found["torch"])
    assert found["cpu_count"] == os.cpu_count()
    assert {"vllm", "megatron-core", "platform", "gpus", "git_revision"} <= set(found)


def run_wandb_job(run_dir: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """In a process with no account and, where the kernel lets us, no network at all."""
    isolated = ["unshare", "-rn"]
    can_isolate = shutil.which("unshare") and subprocess.run([*isolated, "true"], capture_output=True).returncode == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(run_dir / "home"), "NETRC": str(run_dir / "netrc"), "PYTHONPATH": os.getcwd()}
    command = [*(isolated if can_isolate else []), sys.executable, "-c", WANDB_JOB, str(run_dir), mode]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL, check=False
    )


def test_wandb_offline_needs_neither_account_nor_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = run_wandb_job(tmp_path, "offline")
    assert (done.returncode, done.stderr) == (0, "")
    assert "wandb" not in done.stdout
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"0.123456789" in run.read_bytes()
    assert len(read_metrics(tmp_path)) == 2


def test_wandb_online_without_an_account_is_said_once_and_the_training_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = run_wandb_job(tmp_path, "online")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb is off from here on (UsageError") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_wandb_that_is_not_installed_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import then raises ImportError
    with MetricsWriter(tmp_path, console=False, wandb=WandbConfig()) as writer:
        writer.log(1, {"reward": 1.0})
        writer.log(2, {"reward": 1.0})
    assert capsys.readouterr().err.count("wandb is off from here on") == 1
    assert len(read_metrics(tmp_path)) == 2
