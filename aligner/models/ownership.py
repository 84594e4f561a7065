"""Ownership of a model folder: a small file in it records the run that wrote it and the files that it wrote (no torch).

An export replaces its folder as a whole, so the folder must not hold files of anyone else.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MARK = ".aligner"
"""The file: {"run": the run's id or null, "files": names}."""
_ADDED = (MARK, "best.json", ".best.json")
"""Files that a run later adds to an export."""
_USUAL = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "additional_chat_templates",
    "shards.json", "training.json",
)  # fmt: skip
"""Files that aligner and transformers write; a folder without a mark may be replaced if it holds no others."""


def mark(folder: Path, run: str | None, *, adopted: bool = False) -> None:
    """Record that the files in `folder` were written by `run` (None: by no run).

    Args:
        adopted: the folder is an earlier version's, which wrote no mark: only files with usual names count as its own.
    """
    names = [path.name for path in folder.iterdir() if not adopted or _usual(path.name)]
    (folder / MARK).write_text(json.dumps({"run": run, "files": sorted({*names} - {*_ADDED})}) + "\n", encoding="utf-8")


def run_of(folder: Path) -> str | None:
    """The id of the run that wrote the folder; None if unknown."""
    run = _read(folder).get("run")
    return run if isinstance(run, str) else None


def others_files(folder: Path) -> list[str]:
    """Names of files in the folder that its writer did not write."""
    mark_content = _read(folder)
    known = {*mark_content.get("files", ()), *_ADDED} if mark_content else None
    return sorted(p.name for p in folder.iterdir() if not (_usual(p.name) if known is None else p.name in known))


def check_replaceable(folder: Path, run: str | None = None) -> None:
    """Check that `folder` may be replaced by a new export.

    Args:
        run: the run that replaces it; None: no run, which may replace any folder that holds only a model.

    Raises:
        ValueError: it is a link, not a folder, not a model, another run's model, or has other files.
    """
    if folder.is_symlink():
        raise ValueError(
            f"{folder} is a link to {folder.resolve()}, which would be replaced; write to a folder itself."
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is not a checkpoint that could be replaced; write to a new folder.")
    if run is not None and run_of(folder) != run:
        raise ValueError(f"{folder} is a model that this run has not written, and would be replaced; move it away.")
    others = others_files(folder)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{folder} would be replaced, and holds what was not written with it: {', '.join(others[:3])}{more}; move that "
            "away."
        )


def _usual(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (*_USUAL, *_ADDED))


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
