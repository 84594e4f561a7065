"""The parts of tools/bench/gpu_check.py at tiny sizes on a CPU: they pass, and what they are to find they find."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import gpu_check

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name", [name for name in gpu_check.PARTS if name != "policy"]
)  # which makes a world of its own
def test_a_part_passes(name: str) -> None:
    with warnings.catch_warnings():  # that Megatron finds no Apex
        warnings.simplefilter("ignore")
        numbers = gpu_check.PARTS[name](CPU, True)
    assert numbers and all(isinstance(value, (int, float)) and value >= 0 for value in numbers.values())
    json.dumps(numbers)


@pytest.mark.slow
def test_the_command_with_all_parts(tmp_path: Path) -> None:
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--json", str(tmp_path / "out" / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["part"] for row in written["rows"]] == list(gpu_check.PARTS)
    assert all(f"| {name} | ok |" in done.stdout for name in gpu_check.PARTS)


def test_a_wrong_number_fails_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from aligner.trainer import prefix_attention

    inner = prefix_attention.prefix_attention
    monkeypatch.setattr(
        prefix_attention, "prefix_attention", lambda q, *rest: inner(q, *rest) * (1 + 1e-3 * (q.dtype != torch.float64))
    )
    with pytest.raises(AssertionError, match=r"padded out is .* more than 1e-05"):
        gpu_check.attention(CPU, True)


def test_a_part_that_hangs_or_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    rows = [gpu_check.outcome_of("draws", "cpu", 3)]
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nAssertionError: off is 2, more than 1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    rows.append(gpu_check.outcome_of("adam", "cpu", 3))
    assert [row["status"] for row in rows] == ["no end within 3 s", "failed"]
    assert "off is 2, more than 1" in gpu_check.table(rows)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, says in (
        ([], "torch sees no GPU; --device cpu runs"),
        (["--parts", "speed"], "there is no part speed; use kernels"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
        with pytest.raises(SystemExit):
            gpu_check.main()
        assert says in capsys.readouterr().err
