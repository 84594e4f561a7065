"""Rollout samples as files that people read: one Markdown file for each step that writes them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any

FOLDER = "samples"
SHOWN_FIRST = ("prompt", "response", "reward", "status", "fields")


def write_samples(run_dir: str | Path, step: int, items: Sequence[Mapping[str, Any]]) -> Path:
    """Write RUN_DIR/samples/step_000012.md and return its path.

    An item has `prompt` and `response`, and as known `reward`, `status` (a reward's Status or its name), `fields` (the
    prompt's own JSON fields) and whatever else is worth reading. Neighbours with the same prompt and fields share it.
    """
    lines = [f"# Samples of step {step}", ""]
    together = groupby(items, key=lambda item: (item["prompt"], _compact(item.get("fields"))))
    for number, ((prompt, fields), responses) in enumerate(together, start=1):
        lines += [f"## Prompt {number}", "", *_fenced(prompt), ""]
        lines += [f"Fields: {fields}", ""] if fields not in ("null", "{}") else []
        for index, item in enumerate(responses, start=1):
            lines += [f"### Response {index}: {_verdict(item)}", "", *_fenced(item["response"]), ""]
            lines += [f"- {key}: {_plain(_compact(item[key]))}" for key in item if key not in SHOWN_FIRST]
            lines += [""] if lines[-1] else []
    if not items:
        lines += ["(none)", ""]
    path = Path(run_dir) / FOLDER / f"step_{step:06}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".tmp")
    half_written.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    os.replace(half_written, path)
    return path


def sample_files(run_dir: str | Path) -> list[Path]:
    """The samples files of a run, in the order of their steps."""
    paths = (Path(run_dir) / FOLDER).glob("step_*.md")
    return sorted(paths, key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))


def _verdict(item: Mapping[str, Any]) -> str:
    reward, status = item.get("reward"), item.get("status")
    name = status.name if isinstance(status, Enum) else status
    has_reward = reward is not None and not math.isnan(float(reward))
    value = f"reward {float(reward):.3f}" if has_reward and reward is not None else "no reward"
    return value if name is None else f"{value} ({_plain(str(name)).lower()})"


def _fenced(text: str) -> list[str]:
    """The text as it is, in a fence longer than any run of backticks inside it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", _plain(text), fence]


def _plain(text: str) -> str:
    """Models write escape sequences and bells too; a pager must show them, not obey them."""
    return "".join(char if char in "\n\t" or char.isprintable() else ascii(char)[1:-1] for char in text)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
