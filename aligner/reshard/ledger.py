"""The ledger: what one weight transfer moved, beside the least that it could have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SyncRow:
    """One rank's account of one transfer; bytes are payload in the destination's dtype."""

    moved_bytes: int = 0
    """Bytes this rank sent."""
    received_bytes: int = 0
    """Bytes this rank received."""
    minimum_bytes: int = 0
    """Bytes this rank needed and did not hold; over all ranks, the `moved_bytes` should sum to the sum of these."""
    local_bytes: int = 0
    """Bytes this rank copied within itself."""
    checksummed: int = 0
    """Regions whose checksum this rank, as destination, found equal to the source's after writing."""
    seconds: float = 0.0
    """Wall seconds of the whole transfer on this rank."""
    seconds_plan: float = 0.0
    """Seconds spent planning, where this transfer made its plan."""
    seconds_pack: float = 0.0
    """Seconds reading, casting and checksumming at the source."""
    seconds_wire: float = 0.0
    """Seconds waiting for sends and receives."""
    seconds_apply: float = 0.0
    """Seconds writing, the engine's own re-layout and its finish included."""
    seconds_verify: float = 0.0
    """Seconds reading back and comparing checksums."""

    def metrics(self) -> dict[str, float]:
        """The row under the metrics' names: reshard_moved_bytes, ..., seconds_reshard, seconds_reshard_plan, ..."""
        return {_metric(f.name): float(getattr(self, f.name)) for f in fields(self)}


def total(rows: Sequence[SyncRow]) -> SyncRow:
    """The account of a transfer over all its ranks: bytes and counts added, seconds of the slowest rank."""
    merged: dict[str, Any] = {}
    for f in fields(SyncRow):
        values = [getattr(row, f.name) for row in rows]
        merged[f.name] = max(values, default=0.0) if f.name.startswith("seconds") else sum(values)
    return SyncRow(**merged)


def _metric(name: str) -> str:
    return name.replace("seconds", "seconds_reshard", 1) if name.startswith("seconds") else f"reshard_{name}"
