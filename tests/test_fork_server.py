"""A forked program is as one that was executed: the same process, the same numbers, the same end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.conftest import ROOT

PROCESS = """
import gc, json, locale, os, signal, sys, tempfile, threading
print(json.dumps({
    "name": __name__, "file": globals().get("__file__"), "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(),
    "environment": dict(os.environ), "threads": threading.active_count(), "tasks": len(os.listdir("/proc/self/task")),
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3], "parent": os.getppid(),
    "leads": os.getpgid(0) == os.getpid(), "handlers": [str(signal.getsignal(n)) for n in signal.valid_signals()],
    "signals": [  # blocked, ignored, caught; not those that the C library uses for threads
        int(line[7:], 16) & ~(3 << 31) for line in open("/proc/self/status") if line[:6] in ("SigBlk", "SigIgn", "SigCgt")
    ], "umask": os.umask(0o22), "temporary": tempfile.gettempdir(),
    "unbuffered": sys.stdout.write_through, "encoding": [sys.stdout.encoding, locale.getpreferredencoding()],
    "hooks": [sys.excepthook.__name__ == "excepthook", sys.gettrace(), sys.getprofile()], "collector": gc.get_threshold(),
    "options": sys.warnoptions, "main": sys.modules["__main__"].__dict__ is globals(),
}))
"""
NUMBERS = """
import json, random, sys, warnings, zlib
warnings.simplefilter("ignore")
import numpy, torch, vllm.entrypoints.llm, aligner.trainer.megatron.layers
torch.manual_seed(3)
model = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(5):
    model(torch.randn(9, 33, 64)).square().mean().backward()
    optimizer.step()
print(json.dumps({
    "bits": [zlib.crc32(p.detach().numpy().tobytes()) for p in model.parameters()], "seed": torch.initial_seed(),
    "threads": [torch.get_num_threads(), torch.get_num_interop_threads()], "type": str(torch.get_default_dtype()),
    "precision": torch.get_float32_matmul_precision(), "deterministic": torch.are_deterministic_algorithms_enabled(),
}))
"""


def output(run: Callable[..., Any], program: list[str], **options: Any) -> Any:
    done = run([sys.executable, "-u", *program], capture_output=True, text=True, timeout=200, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["script", "module", "code"])
def test_the_process_is_as_one_that_was_executed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "facts.py").write_text(PROCESS)
    program = {
        "script": [str(tmp_path / "facts.py"), "a b"],
        "module": ["-m", "facts", "-x"],
        "code": ["-c", PROCESS, "1"],
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "TMPDIR": str(tmp_path),
        "A": "ü",
    }
    options: dict[str, Any] = {"env": environment, "cwd": tmp_path, "start_new_session": True}
    forked = output(fork_server.run, program[kind], **options)
    assert forked == output(subprocess.run, program[kind], **options)
    assert forked["parent"] == os.getpid()


def test_the_same_numbers_to_the_last_bit() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    forked, executed = (output(run, ["-c", NUMBERS], env=environment) for run in (fork_server.run, subprocess.run))
    assert forked == executed


def test_it_is_forked_and_draws_its_own_random_numbers() -> None:
    program = "import json, random, sys, numpy; print(json.dumps([random.random(), numpy.random.rand(), 'vllm' in sys.modules]))"
    one, other = (output(fork_server.run, ["-c", program]) for _ in range(2))
    assert one[2] and other[2], "it was executed"
    assert one[0] != other[0] and one[1] != other[1]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('why')", 1),
        ("import atexit; atexit.register(print, 'last'); 1 / 0", 1),
        ("import os; os._exit(9)", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("raise KeyboardInterrupt", -2),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('end'))).start()", 0),
    ],
)
def test_it_ends_as_one_that_was_executed(program: str, status: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    forked, executed = (
        run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
        for run in (fork_server.run, subprocess.run)
    )
    # from 3.13 on, a traceback shows the lines of a program given by -c, where the interpreter itself runs it
    stderr = re.sub(r"^ {4}.*\n", "", executed.stderr, flags=re.MULTILINE)
    assert (forked.returncode, forked.stdout, forked.stderr) == (status, executed.stdout, stderr)


def test_signals_reach_it() -> None:
    process = fork_server.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


@pytest.mark.parametrize(
    "different", [{"OMP_NUM_THREADS": "2"}, {"PYTHONHASHSEED": "5"}, {"PYTHONPATH": "own"}, {"HF_HUB_OFFLINE": "0"}]
)
def test_what_forking_could_not_give_is_executed(different: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import os; os.environ['SITE'] = 'own'")
    program = "import json, os, sys; print(json.dumps(['torch' in sys.modules, hash('a'), os.environ.get('SITE')]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **different}
    options: dict[str, Any] = {"env": environment, "cwd": tmp_path}
    imported, number, site = output(fork_server.run, ["-c", program], **options)
    assert not imported
    assert site == ("own" if "PYTHONPATH" in different else None)
    if "PYTHONHASHSEED" in different:
        assert number == output(subprocess.run, ["-c", program], **options)[1]


def test_ranks_are_torchruns_children_and_it_starts_them_again(torchrun: Any, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(
        """
import os, signal, sys, time
rank, attempt = (int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
parent = os.getppid()
sys.stdout.write(f"rank {rank}, attempt {attempt}: {parent == os.getsid(parent)} {'vllm' in sys.modules}\\n")
if attempt == 0 and rank == 1:
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100 if attempt == 0 else 0)
sys.exit(5 if "fails" in sys.argv else 0)
"""
    )
    done = torchrun(2, ["--max-restarts", "1", str(tmp_path / "ranks.py"), "ends"], seconds=60)
    assert done.returncode == 0, done.stderr
    for attempt in range(2):
        assert all(f"rank {rank}, attempt {attempt}: True True" in done.stdout for rank in range(2)), done.stdout
    done = torchrun(2, ["--max-restarts", "1", str(tmp_path / "ranks.py"), "fails"], seconds=60)
    assert done.returncode == 1 and "exitcode  : 5" in done.stderr and "exitcode: -9" in done.stderr


def test_a_job_over_its_time_is_killed_with_its_ranks(torchrun: Any) -> None:
    begin = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"no end within 15 s\n(?s:.*)asleep"):
        torchrun(2, "import time; print('asleep', flush=True); time.sleep(100)", seconds=15)
    assert time.monotonic() - begin < 60
