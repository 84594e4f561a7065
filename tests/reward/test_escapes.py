"""Each attempt twice: the very program that achieves nothing inside the sandbox does what it wants outside of it.

Without the first half a program that fails for a reason of its own would pass for one that is held.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aligner.reward.sandbox import Limits, Outcome, isolation_problem, run_python

PROBLEM = isolation_problem("namespaces")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"no namespaces: {PROBLEM}")
SECRET = "a-secret-of-the-job"


@dataclass
class Job:
    """What a job has around it that a program must not get at."""

    folder: Path
    ports: dict[str, int]
    process: int
    """Its environment holds the secret."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A run's folder, a home with credentials, listeners of every kind, and a process with a secret."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai password {SECRET}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"answers: {SECRET}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    process = subprocess.Popen(["sleep", "300"], env={"WANDB_API_KEY": SECRET})
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        ports = {}
        for name, family, where in (("tcp", socket.AF_INET, "127.0.0.1"), ("tcp6", socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError):  # a host without IPv6
                listener = stack.enter_context(socket.create_server((where, 0), family=family))
                ports[name] = listener.getsockname()[1]
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        ports["udp"] = udp.getsockname()[1]
        for address in (str(tmp_path / "door"), f"\0door-{tmp_path.name}"):
            door = stack.enter_context(socket.socket(socket.AF_UNIX))
            door.bind(address)
            door.listen()
        yield Job(tmp_path, ports, process.pid)


def inside(code: str, **limits: float) -> Outcome:
    return run_python(["program.py"], {"program.py": code}, b"", Limits(**{"seconds": 60.0, **limits}))  # type: ignore[arg-type]


def outside(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, timeout=60, check=False)


def reads(path: str) -> str:
    return f"print(open({path!r}, 'rb').read())"


READS = {
    "the environment": "import os; print(dict(os.environ))",
    "a process's environment": "print(open('/proc/PROCESS/environ').read())",
    "every environment": (
        "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n try: print(open(p).read())\n except OSError: pass"
    ),
    "a process's root": "print(open('/proc/PROCESS/rootFOLDER/home/.netrc').read())",
    "~/.netrc": "print(open('FOLDER/home/.netrc').read())",
    "the run's folder": "import os; print(os.listdir('FOLDER/run'), open('FOLDER/run/config.yaml').read())",
    "a link to the run": "import os; os.symlink('FOLDER/run/config.yaml', 'l'); print(open('l').read()); os.remove('l')",
    "up from here": "print(open('/' + '../' * 40 + 'FOLDER/run/config.yaml').read())",
}


@pytest.mark.parametrize("what", READS)
def test_secrets_are_not_to_be_read(job: Job, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job.folder)
    code = READS[what].replace("FOLDER", str(job.folder)).replace("PROCESS", str(job.process))
    assert SECRET.encode() in outside(code).stdout, "outside it is there"
    outcome = inside(code)
    assert SECRET.encode() not in outcome.stdout + outcome.stderr and not outcome.stopped


PARENT = """
import subprocess, sys
sys.path.insert(0, ROOT)
from aligner.reward.sandbox import run_python
code = "import os; print([line for line in open(f'/proc/{os.getppid()}/environ').read().split(chr(0)) if 'KEY' in line])"
print(subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, env={}).stdout.decode().strip())
print(run_python(["-c", code], {}).stdout.decode().strip() or "nothing")
"""


def test_the_environment_of_the_process_that_asks() -> None:
    """A worker of a job whose environment holds a key: its child reads it, its sandbox does not."""
    program = PARENT.replace("ROOT", repr(str(Path(__file__).resolve().parents[2])))
    done = subprocess.run(
        [sys.executable, "-c", program], env={"WANDB_API_KEY": SECRET}, capture_output=True, text=True, timeout=60
    )
    child, boxed = done.stdout.splitlines()
    assert child == f"['WANDB_API_KEY={SECRET}']" and boxed in ("[]", "nothing"), done.stdout + done.stderr


WRITES = {
    "a file": "open('FOLDER/run/mine', 'w').write('x')",
    "over a file": "open('FOLDER/run/config.yaml', 'a').write('x')",
    "away with a file": "import os; os.remove('FOLDER/run/config.yaml')",
    "/tmp": "open('/tmp/TMPNAME', 'w').write('x')",
    "shared memory": "open('/dev/shm/TMPNAME', 'w').write('x')",
    "through a process": "open('/proc/PROCESS/rootFOLDER/run/mine', 'w').write('x')",
}


@pytest.mark.parametrize("what", WRITES)
def test_nothing_is_written_outside(job: Job, what: str) -> None:
    name = f"escape-{os.getpid()}"
    code = WRITES[what].replace("FOLDER", str(job.folder)).replace("PROCESS", str(job.process)).replace("TMPNAME", name)
    kept = [job.folder / "run" / "mine", Path("/tmp") / name, Path("/dev/shm") / name]
    before = (job.folder / "run" / "config.yaml").read_text()

    def changed() -> bool:
        config = job.folder / "run" / "config.yaml"
        return any(path.exists() for path in kept) or not config.exists() or config.read_text() != before

    assert inside(code).code == 1
    assert not changed()
    assert outside(code).returncode == 0 and changed(), "outside it is done"
    for path in kept:
        path.unlink(missing_ok=True)


CONNECTS = {
    "tcp": "s = socket.create_connection(('127.0.0.1', PORT), 5)",
    "tcp6": "s = socket.create_connection(('::1', PORT), 5)",
    "udp": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', PORT))",
    "unix": "s = socket.socket(socket.AF_UNIX); s.connect('FOLDER/door')",
    "abstract": "s = socket.socket(socket.AF_UNIX); s.connect('\\0door-NAME')",
    "the host's interfaces": "assert any(name != 'lo' for _, name in socket.if_nameindex())",
}


@pytest.mark.parametrize("what", CONNECTS)
def test_nobody_is_reached(job: Job, what: str) -> None:
    if what == "tcp6" and what not in job.ports:
        pytest.skip("this host has no IPv6")
    code = CONNECTS[what].replace("FOLDER", str(job.folder)).replace("NAME", job.folder.name)
    code = "import socket\n" + code.replace("PORT", str(job.ports.get(what, 0))) + "\nprint('reached')"
    out = outside(code)
    if what == "the host's interfaces" and out.returncode:
        pytest.skip("this host has no network")
    assert out.stdout == b"reached\n", out.stderr
    outcome = inside(code)
    assert outcome.code == 1 and b"reached" not in outcome.stdout, outcome


def test_a_signal_to_the_job(job: Job) -> None:
    code = f"import os; os.kill({job.process}, 9)"
    assert inside(code).code == 1
    os.kill(job.process, 0)
    with open(f"/proc/{job.process}/stat") as file:
        assert file.read().split()[2] != "Z"
    assert outside(code).returncode == 0
    time.sleep(0.2)
    with open(f"/proc/{job.process}/stat") as file:
        assert file.read().split()[2] == "Z"


def test_an_endless_loop() -> None:
    """Outside it goes on for as long as it is looked at."""
    code = "while True: pass"
    start = time.monotonic()
    assert inside(code, seconds=1.0).stopped == "time" and time.monotonic() - start < 20
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3.0)
    process.kill()
    process.wait()


def test_a_fork_bomb() -> None:
    """Of 60 children all are there outside; inside no more than the limit, and the host's own number is as before."""
    code = """
import os, signal, time
children = []
try:
    for _ in range(60):
        child = os.fork()
        if not child: time.sleep(60); os._exit(0)
        children.append(child)
except OSError as error: print(error.errno)
print(len(children), flush=True)
for child in children: os.kill(child, signal.SIGKILL)
"""
    assert outside(code).stdout == b"60\n"
    errno, count = inside(code, processes=8).stdout.split()
    assert errno == b"11" and int(count) <= 8


def test_a_real_fork_bomb_ends_with_its_time() -> None:
    """Only inside: it multiplies as fast as it can."""
    start = time.monotonic()
    outcome = inside("import os\nwhile True:\n try: os.fork()\n except OSError: pass", seconds=2.0, processes=16)
    assert (outcome.stopped, outcome.code) == ("time", -signal.SIGKILL) and time.monotonic() - start < 20
    assert inside("print('the next one runs')").stdout == b"the next one runs\n"


def test_ten_gigabytes() -> None:
    """Outside the addresses are given (nothing is touched, so no machine suffers); inside they are not."""
    code = """
import mmap
try: m = mmap.mmap(-1, 10 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
except OSError as error: print(error.errno)
else: print(len(m) >> 30)
"""
    assert outside(code).stdout == b"10\n"
    assert inside(code, memory_mb=1024).stdout == b"12\n"
    outcome = inside("x = bytearray(10 << 30)")
    assert outcome.code == 1 and b"MemoryError" in outcome.stderr


def test_memory_that_is_no_address_space() -> None:
    """Anonymous files are bounded by their size and by open descriptors: 64 of file_mb for each process."""
    code = """
import os
held = []
try:
    while len(held) < 200:
        held.append(os.memfd_create("m"))
        for _ in range(8): os.write(held[-1], bytes(1 << 20))
except OSError as error: print(error.errno)
print(sum(os.fstat(fd).st_size for fd in held) >> 20)
"""
    found = inside(code.replace("range(8)", "range(1)"), file_mb=1).stdout.split()
    assert found[0] == b"24" and 32 <= int(found[1]) <= 64, found
    assert inside("import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)" + code, file_mb=2).stdout.split() == [
        b"27",
        b"2",
    ]
