"""Model classes in Python files of a checkpoint's own folder, which its config.json names in `auto_map`."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedConfig, PreTrainedModel


def check_in_folder(folder: Path, auto_map: Any) -> None:
    """Raises ValueError where an entry of a configuration or model is no FILE.CLASS of the folder: trust is in its files alone."""
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder}/config.json: auto_map={auto_map!r} must be an object of FILE.CLASS by auto class.")
    for auto, named in auto_map.items():
        if auto.startswith(("AutoTokenizer", "AutoProcessor")):
            continue
        if not isinstance(named, str) or "--" in named or named.count(".") != 1:
            raise ValueError(
                f"{folder}/config.json: auto_map.{auto}={named!r} is no FILE.CLASS of this folder; put the file into the folder, "
                "and name it without its repository."
            )


def remote_class(config: PreTrainedConfig, auto: str, path: str | Path) -> type[PreTrainedModel] | None:
    """The folder's class for transformers' auto class of this name; None: its auto_map has no such entry.

    Raises:
        ValueError: its file cannot be run, or has no such class.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module  # imported here: it takes a second

    named: Any = (getattr(config, "auto_map", None) or {}).get(auto)
    if named is None:
        return None
    try:
        with loading_code(path, True):
            kind: type[PreTrainedModel] = get_class_from_dynamic_module(named, str(path), local_files_only=True)
    except Exception as error:  # it is anybody's code
        raise ValueError(
            f"{path}/config.json: auto_map.{auto}={named} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return kind


def loading_code(path: str | Path, trusted: bool) -> AbstractContextManager[None]:
    """Around what loads trusted code of a folder: one process of this host at a time, since transformers copies the files to its
    cache of modules without a lock, and another rank could import half of one."""
    return _locked() if trusted and any(Path(path).glob("*.py")) else nullcontext()


@contextmanager
def _locked() -> Iterator[None]:
    from transformers.utils import HF_MODULES_CACHE

    folder = Path(HF_MODULES_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".aligner.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def code_files(folder: Path, auto_map: Mapping[str, Any]) -> list[Path]:
    """The Python files of the folder that its auto_map names, and those that they import from beside them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    named = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value]) if name]
    files = {folder / f"{name.partition('.')[0]}.py" for name in named if "--" not in name}
    there = {file for file in files if file.is_file()}
    return sorted({*there, *(Path(other) for file in there for other in get_relative_import_files(file))})


def copy_code(folder: Path, target: Path, auto_map: Mapping[str, Any]) -> list[Path]:
    """Copy `code_files` beside an export. Returns the copies."""
    copies = []
    for file in code_files(folder, auto_map):
        copy = target / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        copies.append(copy)
    return copies
