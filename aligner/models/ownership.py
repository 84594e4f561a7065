"""Who wrote a folder of a model: a small file in it says which run, and which files were written with it (no torch).

A folder is replaced as a whole. So before it is, nothing may lie in it that somebody else has put there.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MARK = ".aligner"
"""The file: {"run": the run's id or null, "files": names}."""
_ADDED = (MARK, "best.json", ".best.json")
"""What a run puts beside the files of an export afterwards."""
_USUAL = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "additional_chat_templates",
    "shards.json", "training.json",
)  # fmt: skip
"""Files of a model as this program and transformers write it: what a folder without a mark may hold and be replaced."""


def mark(folder: Path, run: str | None, *, adopted: bool = False) -> None:
    """Say that everything in `folder` was written together, by `run` (None: by no run).

    Args:
        adopted: of an earlier version, which left no mark: only files with usual names are taken for its own.
    """
    names = [path.name for path in folder.iterdir() if not adopted or _usual(path.name)]
    (folder / MARK).write_text(json.dumps({"run": run, "files": sorted({*names} - {*_ADDED})}) + "\n", encoding="utf-8")


def run_of(folder: Path) -> str | None:
    """The run that wrote it; None where that is not known."""
    found = _read(folder).get("run")
    return found if isinstance(found, str) else None


def others_files(folder: Path) -> list[str]:
    """Names in the folder that were not written with it."""
    found = _read(folder)
    known = {*found.get("files", ()), *_ADDED} if found else None
    return sorted(p.name for p in folder.iterdir() if not (_usual(p.name) if known is None else p.name in known))


def check_replaceable(folder: Path, run: str | None = None) -> None:
    """Before `folder` is replaced by a new one.

    Args:
        run: who wants to; None: no run, which may replace any folder that holds nothing but a model.

    Raises:
        ValueError: it is a link, no folder, no model, another's model, or has files that are not the model's.
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
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
