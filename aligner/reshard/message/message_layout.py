"""Where everything is in a message: a pure function of its items, so that both ends have the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch

from aligner.reshard.plan.transfer_plan import Item

_ALIGN_WORDS = 8  # what is behind the header starts on a cache line


@dataclass(frozen=True)
class MessageLayout:
    """Small items first, one after the other, each padded to whole 64-bit words; then a place for each large one."""

    items: tuple[Item, ...]
    sizes: tuple[int, ...]
    """Bytes of each item."""
    small: int
    """Number of small items; they come first."""
    bounds: tuple[int, ...]
    """[small + 1] offsets of the small items, and their end, in words from the end of the header."""
    places: tuple[int, ...]
    """[large + 1] offsets of the large items' places, and the end, in words from the end of the header."""
    rows: int
    """Number of checksums of the small items together, one for each row of words; each large item has one of its own."""
    dtypes: tuple[torch.dtype, ...]
    header: int
    """Words of status, identity and checksums."""
    payload_bytes: int
    """Bytes of the items, the padding between them left out."""
    digest: bytes
    """Hash of which regions, in which order and dtypes, the message holds."""

    @property
    def words(self) -> int:
        """Size of the whole message in 64-bit words."""
        return self.header + self.places[-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each item is, in words from the end of the header."""
        return (*self.bounds[:-1], *self.places[:-1])

    @property
    def large(self) -> range:
        """Numbers of the large items."""
        return range(self.small, len(self.items))

    def identity(self, transfer: int) -> int:
        """A 64-bit hash of the transfer's number and the regions: what tells a message from any other."""
        identified = self.digest + transfer.to_bytes(8, "little")
        return int.from_bytes(blake2b(identified, digest_size=8).digest(), "little", signed=True)

    @property
    def sums(self) -> int:
        """Number of checksums."""
        return self.rows + len(self.large)

    def covered_items(self, rows: Sequence[int], row_words: int) -> list[int]:
        """Numbers of the items that these checksums cover, wholly or in part."""
        covered = [number - self.rows + self.small for number in rows if number >= self.rows]
        for number in range(self.small):
            start, end = self.bounds[number], self.bounds[number + 1]
            if any(start < (row + 1) * row_words and end > row * row_words for row in rows):
                covered.append(number)
        return sorted(covered)


def message_layout(items: Sequence[Item], large_bytes: float, row_words: int) -> MessageLayout:
    """The layout of a message of these items.

    Args:
        large_bytes: items of at least this size are large.
        row_words: words of small items that one checksum covers.
    """
    sizes = [item.bytes for item in items]
    large = [number for number, size in enumerate(sizes) if size >= large_bytes]
    order = [number for number, size in enumerate(sizes) if size < large_bytes] + large
    small = len(order) - len(large)
    bounds = [0]
    for number in order[:small]:
        bounds.append(bounds[-1] + words(sizes[number]))
    rows = -(-bounds[-1] // row_words)
    places = [rows * row_words]
    for number in large:
        places.append(places[-1] + -(-words(sizes[number]) // _ALIGN_WORDS) * _ALIGN_WORDS)
    ordered = tuple(items[number] for number in order)
    regions = ";".join(f"{item.name}{item.lo}{item.size}{item.destination.dtype}" for item in ordered)
    return MessageLayout(
        items=ordered,
        sizes=tuple(sizes[number] for number in order),
        small=small,
        bounds=tuple(bounds),
        places=tuple(places),
        rows=rows,
        dtypes=tuple(getattr(torch, item.destination.dtype) for item in ordered),
        header=-(-(2 + rows + len(large)) // _ALIGN_WORDS) * _ALIGN_WORDS,
        payload_bytes=sum(sizes),
        digest=blake2b(regions.encode()).digest(),
    )


def words(size: int) -> int:
    """Number of 64-bit words that hold `size` bytes."""
    return (size + 7) // 8
