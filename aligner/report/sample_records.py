"""Rollout samples exactly as they were trained on, one JSON line each: token ids, turns, log-probabilities, versions, rewards.

They stand beside the readable files (`samples.py`), for `tools/replay.py` and whoever wants to compute on them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aligner.report.samples import FOLDER


@dataclass(frozen=True)
class RecordedTurn:
    """One generation by the policy: consecutive sampled tokens of a row."""

    number: int
    """From 1."""
    start: int
    """Index of its first token in the row."""
    stop: int
    """One past its last token."""
    logp: list[float | None]
    """Log-probability of each token from the rollout engine, in nats; None: it is not known, or not finite."""
    versions: list[int]
    """Version of the policy's weights (number of updates) that sampled each token; empty: not known."""
    reward: float | None = None
    """What the environment gave after it; None: it gives none for turns."""


@dataclass(frozen=True)
class SampleRecord:
    """One row of a step's batch: a response, or an episode."""

    row: int
    """Its number in the batch."""
    prompt_index: int
    """Index of its prompt in the data set."""
    fields: dict[str, Any]
    """The prompt's JSON fields, with the rendered "prompt"."""
    tokens: list[int]
    """All token ids: of the prompt, of every turn, and of what the environment said in between; an episode's segments one after the other."""
    prompt_tokens: int
    """Number of tokens of the prompt, or of the first context."""
    turns: list[RecordedTurn]
    """What was sampled; the tokens between turns were not."""
    segments: list[int]
    """Index of the first token of each segment; [0]: the row is one context."""
    truncated: bool | None
    """A limit ended it."""
    reward: float | None
    """What was trained on; None: it has none."""
    status: str
    """Of the reward: "ok", "failed", ..."""
    components: dict[str, float | None] = field(default_factory=dict)
    """Raw values of the reward's components."""
    episode_reward: float | None = None
    """What the environment gave for the episode; None: it failed, or there is no environment."""
    episode: dict[str, Any] | None = None
    """How the episode "ended", its messages, metrics and seed; None: single-turn generation."""

    @property
    def task(self) -> dict[str, Any]:
        """The data set's JSON row: a row of "messages" has no "prompt" of its own."""
        return {name: value for name, value in self.fields.items() if name != "prompt" or "messages" not in self.fields}

    def segment_of(self, index: int) -> int:
        """Index of the first token of the segment that holds token `index`."""
        return max(start for start in self.segments if start <= index)


def records_path(run_dir: str | Path, step: int) -> Path:
    """RUN_DIR/samples/step_000012.jsonl."""
    return Path(run_dir) / FOLDER / f"step_{step:06}.jsonl"


def write_records(run_dir: str | Path, step: int, records: Sequence[SampleRecord]) -> Path:
    """Write a step's records and return the file's path; numbers that are not finite become null."""
    path = records_path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".tmp")
    with half_written.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(_finite(asdict(record)), ensure_ascii=False, allow_nan=False, default=str) + "\n")
    os.replace(half_written, path)
    return path


def read_records(run_dir: str | Path, step: int) -> Iterator[SampleRecord]:
    """A step's records.

    Raises:
        ValueError: the run has none of this step; names the steps that it has.
    """
    path = records_path(run_dir, step)
    if not path.is_file():
        steps = sorted(int(file.stem.removeprefix("step_")) for file in path.parent.glob("step_*.jsonl"))
        has = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
        raise ValueError(f"{run_dir} has no samples of step {step}: {has} (logging.samples_every sets which are kept).")
    with path.open(encoding="utf-8") as file:
        for line in file:
            values: dict[str, Any] = json.loads(line)
            yield SampleRecord(**{**values, "turns": [RecordedTurn(**turn) for turn in values["turns"]]})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
