"""Statistics of a weight sync: bytes moved, beside the least that could have been moved, and seconds by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SyncStats:
    """What one transfer moved on one rank; bytes are payload in the destination's dtype."""

    moved_bytes: int = 0
    """Bytes this rank sent."""
    relayed_bytes: int = 0
    """Of these, bytes that it had received and relayed to other receivers."""
    received_bytes: int = 0
    """Bytes this rank received."""
    minimum_bytes: int = 0
    """Bytes this rank needed and did not hold; over all ranks, the `moved_bytes` should sum to the sum of these."""
    local_bytes: int = 0
    """Bytes this rank copied within itself."""
    changed_bytes: int = 0
    """Bytes of received elements that differ from the last transfer's; with reshard.deltas, else all received bytes."""
    checksummed: int = 0
    """Regions whose checksum this rank, as destination, verified against the source's after writing."""
    seconds: float = 0.0
    """Wall seconds of the whole transfer on this rank."""
    seconds_plan: float = 0.0
    """Seconds spent planning, where this transfer made its plan."""
    seconds_pack: float = 0.0
    """Seconds reading, casting and checksumming what is sent."""
    seconds_wire: float = 0.0
    """Seconds waiting for sends and receives."""
    seconds_apply: float = 0.0
    """Seconds writing received regions and copying local ones, the proof, the engine's re-layout and its finish included."""

    @property
    def gigabytes_per_second(self) -> float:
        """GB/s: the larger of bytes sent and received, divided by the seconds of the whole transfer."""
        return max(self.moved_bytes, self.received_bytes) / self.seconds / 1e9 if self.seconds else 0.0

    def metrics(self) -> dict[str, float]:
        """The numbers under their metrics' names: reshard_moved_bytes, ..., seconds_reshard, seconds_reshard_plan, ..."""
        names = [*(f.name for f in fields(self)), "gigabytes_per_second"]
        return {_metric(name): float(getattr(self, name)) for name in names}


def total(rows: Sequence[SyncStats]) -> SyncStats:
    """Statistics of a transfer over all its ranks: bytes and counts added, seconds of the slowest rank."""
    merged: dict[str, Any] = {}
    for f in fields(SyncStats):
        values = [getattr(row, f.name) for row in rows]
        merged[f.name] = max(values, default=0.0) if f.name.startswith("seconds") else sum(values)
    return SyncStats(**merged)


def _metric(name: str) -> str:
    return name.replace("seconds", "seconds_reshard", 1) if name.startswith("seconds") else f"reshard_{name}"
