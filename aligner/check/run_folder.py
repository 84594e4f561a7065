"""What a run replaces under its folder, and what must not lie there: looked at before anything is built (no torch)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aligner.checkpoint.claim import FOLDER, run_id
from aligner.models.ownership import MARK, check_replaceable, mark
from aligner.spmd.role_table import USUAL

if TYPE_CHECKING:
    from aligner.config.schema import Config

EXPORTS = "exports"
"""Under run_dir: a Hugging Face folder for each export."""
BEST = "best"
"""Under run_dir: the link to the best export."""
FILES = ("config.yaml", "environment.json", "report.html", "learning_curve.png")
"""What a run writes beside its metrics."""


def models_of(run_dir: str | Path, roles: Iterable[str]) -> dict[str, Path]:
    """The folder that each role's model is written to at the end."""
    return {role: Path(run_dir) / ("model" if role == "policy" else role) for role in roles}


def _models_in(run_dir: Path) -> list[Path]:
    """Where a run may have its models: the usual roles that can learn, and folders that a run has marked as its own."""
    usual = models_of(run_dir, [name for name, role in USUAL.items() if role.kind.learns != "never"]).values()
    return list(dict.fromkeys([*usual, *(mark.parent for mark in run_dir.glob(f"*/{MARK}"))]))


def check_places(config: Config, learns: Iterable[str]) -> None:
    """Nothing that this run would replace is somebody else's.

    Args:
        learns: the roles that may leave a model.

    Raises:
        ValueError: a folder, link or file that this run has not written; the message says what to do.
    """
    run_dir, train = Path(config.run_dir), config.train
    run = run_id(run_dir)
    for other in Path(os.path.realpath(run_dir)).parents[:3]:
        inside = [*_models_in(other), other / EXPORTS, other / FOLDER]
        if run_id(other) is not None and any(_inside(run_dir, folder) for folder in inside):
            raise ValueError(
                f"run_dir={config.run_dir} lies in the run in {other}, which replaces what is there; choose another folder."
            )
    try:
        if run != "":  # a run of an earlier version left no marks: what lies there is taken for its own
            for role, folder in models_of(run_dir, learns).items() if train.save else ():
                contents = f"the {role}'s model (train.save=true)"
                check_replaceable(folder, run or "no run yet")
            contents = "exports of this run"
            for folder in run_dir.glob(f"{EXPORTS}/step_*") if train.export_every or train.keep_best else ():
                check_replaceable(folder, run or "no run yet")
        link, contents = run_dir / BEST, "the link to the best export (train.keep_best=true)"
        if train.keep_best and (link.is_symlink() or link.exists()) and pointed(link) is None:
            raise ValueError(f"{link} is not a link to an export of this run; move it away.")
        contents = "files of this run"
        if run is None and not config.overwrite:
            for file in (run_dir / name for name in FILES):
                if file.exists():
                    raise ValueError(f"{file} is not of a run, and would be replaced; move it away.")
    except ValueError as error:
        raise ValueError(
            f"run_dir={config.run_dir} is where {contents} will be written. {error} Or choose another run_dir."
        ) from None


def check_sources(config: Config, sources: Mapping[str, str | None], learns: Iterable[str]) -> None:
    """Nothing that this run reads lies where it replaces folders; links, `..` and mounts do not hide it.

    Args:
        sources: setting -> the file or folder that it names.

    Raises:
        ValueError: the first that does, with its setting.
    """
    run_dir = Path(config.run_dir)
    replaced = {run_dir / EXPORTS: EXPORTS, run_dir / FOLDER: "checkpoints"}
    if config.train.save:
        replaced |= {folder: f"the {role}'s model" for role, folder in models_of(run_dir, learns).items()}
    for setting, path in sources.items():
        for folder, contents in replaced.items() if path else ():
            if not _inside(Path(path or ""), folder):
                continue
            if contents == EXPORTS:
                raise ValueError(
                    f"{setting}={path} is an export of the run in run_dir={config.run_dir}, which is overwritten; "
                    "choose another run_dir."
                )
            raise ValueError(
                f"{setting}={path} lies in {folder}, where the run in run_dir={config.run_dir} writes {contents} and replaces "
                "what is there; choose another run_dir, or move it."
            )


def pointed(link: Path) -> int | None:
    """The step of the export that a link names; None where it is no such link."""
    if not link.is_symlink():
        return None
    target = Path(os.readlink(link))
    match = re.fullmatch(r"step_(\d+)", target.name) if target.parent == Path(EXPORTS) else None
    return int(match.group(1)) if match else None


def adopt(run_dir: Path, run: str) -> None:
    """Mark what a run of an earlier version has left as its own."""
    for folder in (*_models_in(run_dir), *run_dir.glob(f"{EXPORTS}/step_*")):
        if (folder / "config.json").is_file() and not folder.is_symlink() and not (folder / MARK).exists():
            mark(folder, run, adopted=True)


def _inside(path: Path, folder: Path) -> bool:
    path = Path(os.path.realpath(path))
    if path.is_relative_to(os.path.realpath(folder)):
        return True
    return folder.exists() and any(_same(one, folder) for one in (path, *path.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
