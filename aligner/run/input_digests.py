"""What a run reads besides its settings, as digests: a run that goes on must meet the same rows, models, rules and loop."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from aligner.data.digest import digest
from aligner.data.named_sources import ALONE
from aligner.reward.components import reward_components

if TYPE_CHECKING:
    from aligner.config.schema import Config
    from aligner.data.sets import DataSets

SAMPLE = 1 << 16
"""Bytes that are looked at in the middle and at the end of a file of weights, which is too large to be read for this."""
OURS = Path(__file__).resolve().parent.parent


def inputs_of(config: Config, roles: Iterable[str], data: DataSets) -> dict[str, str]:
    """What it is -> its digest (XXH3, 128 bits), for everything that decides what the run computes and is not a setting.

    Weights are known by their files' names, sizes, headers and two samples of each. What is part of aligner is left out:
    another version of it is told by environment.json.
    """
    digests = {rows_of(name): value for name, value in data.training_digests().items()}
    held = [data.heldout, data.heldout_pairs, data.heldout_answers]
    if any(held):
        digests["rows of data.eval_path"] = digest(held)
    folders = dict(config.model_path(role) for role in roles if config.role(role).kind.head)
    for setting, folder in folders.items():
        digests[f"weights of {setting}"] = _weights(Path(folder))
        digests[f"configuration and tokenizer of {setting}"] = _files(
            file for file in Path(folder).iterdir() if file.suffix in (".json", ".jinja", ".model", ".txt")
        )
    if config.data.chat_template is not None:
        digests["template of data.chat_template"] = _files([Path(config.data.chat_template)])
    sources = {"source of algorithm._target_": _source(str(config.algorithm.get("_target_", "")))}
    if "reward" in roles:
        for part in reward_components(config.reward):
            if part.component.rule:
                sources[f"source of {part.where}.rule"] = _source(part.component.rule)
    return digests | {source: _files([file]) for source, file in sources.items() if file is not None}


def rows_of(source: str) -> str:
    """What the rows of a training source are called."""
    return "rows of data.path" if source == ALONE else f"rows of data.sources.{source}.path"


def _source(name: str) -> Path | None:
    """The file of a function of the user's own: `package.module.function` or `path/to/file.py:function`."""
    target = name.rpartition(":" if ":" in name else ".")[0]
    if target.endswith(".py"):
        file = Path(target)
    else:
        try:
            spec = importlib.util.find_spec(target)
        except (ImportError, ValueError):
            return None
        file = Path(spec.origin) if spec is not None and spec.origin else Path()
    return file if file.is_file() and not file.resolve().is_relative_to(OURS) else None


def _files(files: Iterable[Path]) -> str:
    hasher = xxhash.xxh3_128()
    for file in sorted(files):
        hasher.update(json.dumps([file.name, xxhash.xxh3_128_hexdigest(file.read_bytes())]).encode())
    return hasher.hexdigest()


def _weights(folder: Path) -> str:
    hasher = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        hasher.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            header = min(int.from_bytes(file.read(8), "little"), size)
            hasher.update(file.read(header))
            for at in ((size + header) // 2, max(0, size - SAMPLE)):
                file.seek(at)
                hasher.update(file.read(SAMPLE))
    return hasher.hexdigest()
