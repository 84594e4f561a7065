"""The table of families that were tried: how it reads; and, with -m matrix, that every family does what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tools.families_table import BEGIN, COLUMNS, DOCS, END, seen_of, table, updated
from tools.family_models import MODELS

YES = dict.fromkeys(COLUMNS, "yes") | {"gap": "1e-06"}


def rows_of_page() -> dict[str, list[str]]:
    """model_type -> its cells in docs/families.md."""
    text = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return {cells[1].strip("`"): cells[2:] for cells in lines}


def test_a_failure_is_a_row_and_a_note() -> None:
    text = table({"llama": YES, "gemma2": {**YES, "vllm": "no: ValueError: x", "sync": "", "gap": "2e-03"}})
    assert "| Llama 2, 3 | `llama` | yes | yes | yes | yes | yes | 1e-06 |" in text
    assert "| Gemma 2 | `gemma2` | yes | yes | yes | no |  | **2e-03** |" in text
    assert f"- `gemma2`, {COLUMNS['vllm']}: ValueError: x" in text and "transformers 5" in text


def test_only_the_table_of_the_page_changes() -> None:
    text = DOCS.read_text(encoding="utf-8")
    changed = updated(text, "new")
    assert changed.partition(BEGIN)[0] == text.partition(BEGIN)[0]
    assert changed.partition(END)[2] == text.partition(END)[2]


def test_the_page_has_every_family() -> None:
    assert list(rows_of_page()) == list(MODELS)


def test_a_process_that_hangs_or_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    seen = seen_of("llama", 5)
    assert seen["megatron"].startswith("no: the process ended with 1")

    def late(*_: Any, **settings: Any) -> Any:
        lines = json.dumps({"megatron": "yes"}) + "\n" + json.dumps({"fsdp": "no: x"}) + "\n"
        raise subprocess.TimeoutExpired("python", settings["timeout"], output=lines.encode())

    monkeypatch.setattr(subprocess, "run", late)
    seen = seen_of("llama", 5)
    assert seen["megatron"] == "yes" and seen["fsdp"] == "no: x" and seen["vllm"] == "no: nothing within 5 s"


@pytest.mark.matrix
@pytest.mark.parametrize("name", list(MODELS))
def test_what_the_page_says_of_a_family_is_so(name: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen, said = seen_of(name, 300), rows_of_page()[name]
    for column, cell in zip(COLUMNS, said, strict=True):
        if column == "gap":
            continue
        assert seen[column].split(":")[0] == cell, (column, seen[column])
    if seen["gap"]:
        assert (float(seen["gap"]) > 1e-4) == said[-1].startswith("**")
