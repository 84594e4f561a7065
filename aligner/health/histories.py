"""Ranks' journals as bytes, and where two of them part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from aligner.health.journal import Call


def as_bytes(calls: Iterable[Call]) -> bytes:
    """Consecutive calls: the last one's number (int64), then every digest (uint32), the last one's first."""
    newest_first = list(calls)[::-1]
    digests = np.array([call.digest for call in newest_first], np.uint32)
    return np.int64(newest_first[0].number).tobytes() + digests.tobytes()


def from_bytes(raw: bytes) -> dict[int, int]:
    """{number: digest}."""
    last = int(np.frombuffer(raw, np.int64, 1)[0])
    return {last - back: digest for back, digest in enumerate(np.frombuffer(raw, np.uint32, offset=8).tolist())}


def agree(published: Sequence[bytes]) -> bool:
    """Whether all ranks have one digest at the last call that every rank has made; it covers all calls before it."""
    last = [int.from_bytes(raw[:8], "little") for raw in published]
    common = min(last)
    places = [8 + 4 * (number - common) for number in last]  # beyond the end: a rank that no longer knows
    return len({raw[place : place + 4] for raw, place in zip(published, places, strict=True)} - {b""}) <= 1


def first_difference(histories: list[dict[int, int]]) -> int | None:
    """Lowest call number at which two ranks' digests differ, or None. Histories: {number: digest} per rank."""
    seen: dict[int, int] = {}
    wrong = [n for history in histories for n, digest in history.items() if seen.setdefault(n, digest) != digest]
    return min(wrong, default=None)
