"""Programs that try to do harm, really run: what they reach for is not there, and nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligner.reward import sandbox
from aligner.reward.sandbox import Limits, Outcome, SandboxError, isolation_problem, run_python

OTHER_PYTHON = Path("/usr/bin/python3")


@contextlib.contextmanager
def reachable_python(isolation: str) -> Iterator[None]:
    """Root's program becomes nobody, who may not reach a Python in root's home; the system's does as well."""
    own = sandbox._interpreter
    if isolation == "limits" and os.getuid() == 0 and OTHER_PYTHON.exists():
        sandbox._interpreter = lambda: str(OTHER_PYTHON.resolve())
    try:
        yield
    finally:
        sandbox._interpreter = own


def problem_of(isolation: str) -> str | None:
    with reachable_python(isolation):
        return isolation_problem.__wrapped__(isolation)


PROBLEMS = {isolation: problem_of(isolation) for isolation in sandbox.ISOLATION}
POSSIBLE = [isolation for isolation, problem in PROBLEMS.items() if problem is None]
needs_namespaces = pytest.mark.skipif("namespaces" not in POSSIBLE, reason=f"no namespaces: {PROBLEMS['namespaces']}")
everywhere = pytest.mark.parametrize("isolation", POSSIBLE)
SECRET = "a-token-that-nobody-may-see"


def run(code: str, isolation: str = "namespaces", stdin: bytes = b"", **limits: float) -> Outcome:
    limits = {"seconds": 60.0, **limits}  # far beyond what those need that end by themselves
    with reachable_python(isolation):
        return run_python(["program.py"], {"program.py": code}, stdin, Limits(**limits), isolation)  # type: ignore[arg-type]


def running(mark: str) -> list[str]:
    """Processes with the mark in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            pass
    return found


def test_one_isolation_works_here_at_least() -> None:
    """Where neither does, code rewards are refused before a job starts; the figures below would be worth nothing."""
    assert POSSIBLE, PROBLEMS


@everywhere
def test_a_program_reads_writes_and_ends(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # others make and remove folders in the common one meanwhile; programs run as another user
    folder = tempfile.mkdtemp()
    Path(folder).chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    outcome = run("import sys; print(int(input()) * 2); print('e', file=sys.stderr); sys.exit(3)", isolation, b"21\n")
    assert (outcome.code, outcome.stdout, outcome.stderr, outcome.stopped) == (3, b"42\n", b"e\n", "")
    assert run("import os; os.kill(os.getpid(), 11)", isolation).code == -signal.SIGSEGV
    assert run("open('x.txt', 'w').write('ab'); print(open('x.txt').read())", isolation).stdout == b"ab\n"
    Path(folder).rmdir()  # nothing is left in it


@everywhere
def test_input_and_output_larger_than_a_pipe(isolation: str) -> None:
    text = b"x" * 300_000
    assert run("import sys; sys.stdout.write(sys.stdin.read())", isolation, text).stdout == text
    assert run("print('not read')", isolation, text).stdout == b"not read\n"


@everywhere
def test_no_end_is_ended(isolation: str) -> None:
    start = time.monotonic()
    for code in ("while True: pass", "import time; time.sleep(100)"):
        outcome = run(code, isolation, seconds=0.8)
        assert (outcome.stopped, outcome.code) == ("time", -signal.SIGKILL)
    assert time.monotonic() - start < 20


@everywhere
def test_too_much_output_is_stopped(isolation: str) -> None:
    outcome = run("while True: print('x' * 1000)", isolation, output_kb=100)
    assert outcome.stopped == "output"
    assert 100 * 1024 < len(outcome.stdout) <= 200 * 1024


@everywhere
def test_a_fork_bomb_has_few_processes_and_none_is_left(isolation: str) -> None:
    mark = f"bomb{os.getpid()}{isolation}"
    code = f"""
import os, time
mark, count = "{mark}", 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            os.execv("/usr/bin/sleep", ["{mark}", "100"])
        count += 1
except OSError as error:
    print(count, error.errno, flush=True)
time.sleep(100)
"""
    start = time.monotonic()
    outcome = run(code, isolation, seconds=3.0, processes=12)
    count, errno = outcome.stdout.split()
    assert outcome.stopped == "time" and time.monotonic() - start < 20
    assert 1 <= int(count) <= 12 and errno == b"11"
    assert running(mark) == []


@everywhere
def test_whoever_leaves_the_group_ends_with_the_program(isolation: str) -> None:
    mark = f"left{os.getpid()}{isolation}"
    code = f"""
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/usr/bin/sleep", ["{mark}", "100"])
"""
    start = time.monotonic()
    assert run(code, isolation).code == 0
    assert time.monotonic() - start < 30
    assert running(mark) == []


@everywhere
@pytest.mark.parametrize("code", ["x = bytearray(10 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 24))"])
def test_ten_gigabytes_are_refused(isolation: str, code: str) -> None:
    outcome = run(code, isolation, memory_mb=128)
    assert outcome.code == 1 and b"MemoryError" in outcome.stderr


@everywhere
def test_a_file_beyond_its_limit_is_cut(isolation: str) -> None:
    code = """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with open("big", "wb") as file:
        while True: file.write(bytes(1 << 20))
except OSError as error: print(error.errno, os.path.getsize("big"))
"""
    assert run(code, isolation, file_mb=4).stdout == f"27 {4 << 20}\n".encode()


@needs_namespaces
def test_all_files_together_have_a_limit() -> None:
    code = """
try:
    for i in range(100): open(f"f{i}", "wb").write(bytes(1 << 20))
except OSError as error: print(error.errno, i)
"""
    errno, count = run(code, file_mb=1).stdout.split()
    assert errno == b"28" and int(count) <= 4


@everywhere
def test_no_core_is_dumped_and_no_right_is_gained(isolation: str) -> None:
    code = """
import ctypes, os, resource
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0), os.getuid() == 0)
"""
    assert run(code, isolation).stdout == b"(0, 0) 1 False\n"
    code = "print([line for line in open('/proc/self/status') if line.startswith(('CapEff', 'CapPrm', 'CapAmb'))])"
    if isolation == "limits":
        assert run(code, isolation).stdout.count(b"0000000000000000") == 3


@everywhere
def test_the_environment_is_empty_and_no_file_is_open(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    code = """
import os
print({k: v for k, v in os.environ.items() if k != "LC_CTYPE"})
def is_open(fd):
    try: os.fstat(fd); return True
    except OSError: return False
print([fd for fd in range(64) if is_open(fd)])
"""
    assert run(code, isolation).stdout == b"{}\n[0, 1, 2]\n"


def test_the_secret_is_where_the_program_looks_for_it() -> None:
    """Of the next test: outside, the very same program finds what it is looking for."""
    code = SEARCH.replace("PARENT", str(os.getpid()))
    sleeper = subprocess.Popen(["sleep", "30"], env={"WANDB_API_KEY": SECRET})
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout
    finally:
        sleeper.kill()
        sleeper.wait()
    assert SECRET.encode() in found


SEARCH = """
import glob
for path in glob.glob("/proc/[0-9]*/environ"):
    try: text = open(path).read()
    except OSError: continue
    if "nobody-may-see" in text: print(text)
"""


@needs_namespaces
def test_other_processes_are_not_to_be_seen_or_signalled() -> None:
    sleeper = subprocess.Popen(["sleep", "30"], env={"WANDB_API_KEY": SECRET})
    code = f"""{SEARCH}
import os
for pid in (-1, {sleeper.pid}, {os.getpid()}):
    try: os.kill(pid, 9); print("killed", pid)
    except OSError as error: print(error.errno)
"""
    try:
        assert b"killed" not in run(code).stdout and SECRET.encode() not in run(code).stdout
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@needs_namespaces
def test_nothing_outside_is_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("the held-out answers")
    places = [
        str(tmp_path),
        str(Path.home()),
        str(Path(sandbox.__file__).parent),
        "/tmp",
        "/usr/lib",
        "/usr",
        "/etc",
        "/",
    ]
    code = f"""
import os
for place in {places!r}:
    try:
        open(os.path.join(place, "mine"), "w").write("x"); print("wrote", place)
    except OSError: pass
for path in ({str(tmp_path / "data.txt")!r}, "/etc/passwd", "/etc/shadow", "/proc/1/environ", {__file__!r}):
    try: print("read", path, open(path).read()[:40])
    except OSError: pass
print("end", sorted(os.listdir("/tmp")) if os.path.isdir("/tmp") else "none")
"""
    assert run(code).stdout.startswith(b"end")
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]
    for place in places:
        assert not (Path(place) / "mine").exists()


@needs_namespaces
def test_the_network_is_not_there() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    code = f"""
import socket
for family, where in ((socket.AF_INET, ("127.0.0.1", {listener.getsockname()[1]})), (socket.AF_INET, ("1.1.1.1", 53))):
    s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(2)
    try: s.connect(where); print("connected")
    except OSError as error: print(error.errno)
try: print(socket.getaddrinfo("example.com", 80))
except OSError: print("no name")
print([name for _, name in socket.if_nameindex()])
"""
    assert run(code).stdout == b"101\n101\nno name\n['lo']\n"
    with pytest.raises(BlockingIOError):  # nobody came
        listener.accept()
    with socket.create_connection(listener.getsockname()):  # though it listened all the while
        listener.accept()[0].close()
    listener.close()


@needs_namespaces
def test_the_way_back_to_rights_is_closed() -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x40000000, 0x20000): print(libc.unshare(flags), end=" ")
print(libc.mount(b"tmpfs", b"/box", b"tmpfs", 0, None), libc.chroot(b"/box"), libc.sethostname(b"x", 1))
"""
    assert run(code).stdout.split() == [b"-1"] * 6


@needs_namespaces
def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A worker killed at its row's limit must not leave a program behind."""
    mark = f"orphan{os.getpid()}"
    code = f"import os; os.execv('/usr/bin/sleep', ['{mark}', '100'])"
    program = f"""
import sys
sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})
from aligner.reward.sandbox import Limits, run_python
run_python(["-c", {code!r}], {{}}, limits=Limits(seconds=60.0))
"""
    worker = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 30
    while not running(mark) and time.monotonic() < end:
        time.sleep(0.05)
    # one is the program's; others may be those that hold the mark as part of a longer command
    assert running(mark)
    worker.kill()
    worker.wait()
    end = time.monotonic() + 10
    while running(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert running(mark) == []


ORDINARY = (
    """
import os, sys
sys.path.insert(0, sys.argv[1])
from sandbox import Limits, run_python
assert os.getuid() == 1234
code = """
    + repr("""
import ctypes, os, signal, socket
print({"home", "root", "proc", "work"} & set(os.listdir("/")), os.getuid(), end=" ")
print(ctypes.CDLL(None).unshare(0x10000000), [name for _, name in socket.if_nameindex()], end=" ", flush=True)
try:
    for count in range(100):
        if os.fork() == 0: signal.pause()
except OSError: print(8 < count < 16)
""")
    + """
outcome = run_python(["-c", code], {}, limits=Limits(seconds=60.0))
print(outcome.stdout.decode(), outcome.stderr.decode(), outcome.code)
"""
)


@pytest.mark.skipif(os.getuid() != 0, reason="the tests above ran as an ordinary user already")
@pytest.mark.skipif(not OTHER_PYTHON.exists(), reason=f"an ordinary user's Python is needed: {OTHER_PYTHON}")
@needs_namespaces
def test_an_ordinary_user_has_the_same_sandbox() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name in ("sandbox.py", "confine.py"):
            shutil.copy(Path(sandbox.__file__).with_name(name), folder)
        command = [str(OTHER_PYTHON), "-c", ORDINARY, folder]
        done = subprocess.run(
            command, user=1234, group=1234, extra_groups=[], capture_output=True, text=True, timeout=60
        )
    assert done.stdout.split("\n")[0] == "set() 65534 -1 ['lo'] True", done.stdout + done.stderr


def test_a_sandbox_that_cannot_be_made_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python's own files are not where they are said to be, so the program cannot be started inside."""
    monkeypatch.setattr(sandbox, "_interpreter", lambda: str(shutil.copy(os.path.realpath(sys.executable), tmp_path)))
    with pytest.raises(SandboxError, match="No such file or directory"):
        run_python(["-c", "print(1)"], {})
