"""The launch scripts in a folder of their own, with programs that only record what they are asked."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RECORDER = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" >>"$RECORD"
[[ "$RUNS_LONG" == "" ]] || exec sleep "$RUNS_LONG"
for argument in "$@"; do
    case "$argument" in
        "run_dir='"*"/grpo'") folder="${argument#run_dir=\\'}" && folder="${folder%\\'}" && folder="${folder//\\\\/}" && mkdir -p "$folder" \\
            && touch "$folder/curve.png" "$folder/report.html" ;;
        stage=*) mkdir -p "$RLHF_RUN/${argument#stage=}" ;;&
        stage=preferences) for ((row = 0; row < ${RANKED:-40}; row++)); do echo "$row"; done >"$RLHF_RUN/preferences.jsonl" ;;
    esac
done
"""


class Launch:
    """The launch folder with an environment whose torchrun and python only record what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.record = folder / "commands.log"
        binaries = folder / "bin"
        binaries.mkdir()
        for part in ("launch", "conf"):
            shutil.copytree(ROOT / part, self.root / part)
        environment = f'export PATH="{binaries}:$PATH" ALIGNER_DEVICE="${{ALIGNER_DEVICE:-cpu}}"\n'
        (self.root / "launch" / "environment.sh").write_text(environment)
        for name in ("torchrun", "python", "vllm"):
            (binaries / name).write_text(RECORDER)
            (binaries / name).chmod(stat.S_IRWXU)
        gpus = binaries / "nvidia-smi"
        gpus.write_text('#!/bin/bash\nfor ((i = 0; i < GPUS; i++)); do echo "GPU $i: H200 (UUID: GPU-$i)"; done\n')
        gpus.chmod(stat.S_IRWXU)

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "launch" / script), *arguments]
        environment = {**os.environ, "RECORD": str(self.record), **variables}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    def commands(self) -> list[str]:
        return self.record.read_text().splitlines()


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)
