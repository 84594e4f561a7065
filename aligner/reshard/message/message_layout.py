"""Where everything is in a message: a pure function of its items, so that both ends have the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from aligner.reshard.plan.transfer_plan import Item

_ALIGN_WORDS = 8  # what is behind the header starts on a cache line


@dataclass(frozen=True)
class MessageLayout:
    """Small items first, one after the other, each padded to whole 64-bit words; then room for each large one."""

    items: tuple[Item, ...]
    small: int
    """So many items are small."""
    bounds: tuple[int, ...]
    """The first word of each small item behind the header, and their end."""
    places: tuple[int, ...]
    """The first word of each large item's room behind the header, and the end."""
    rows: int
    """So many checksums are of the small items together; each large one has one of its own."""
    dtypes: tuple[torch.dtype, ...]
    header: int
    """Words of status, identity and checksums."""
    payload_bytes: int
    """Bytes of the items, the padding between them left out."""
    digest: bytes
    """Stands for which regions, in which order and dtype, the message is about."""

    @property
    def words(self) -> int:
        return self.header + self.places[-1]

    @property
    def large(self) -> range:
        return range(self.small, len(self.items))

    def identity(self, transfer: int) -> int:
        """64 bits that stand for the transfer and the regions."""
        told = self.digest + transfer.to_bytes(8, "little")
        return int.from_bytes(blake2b(told, digest_size=8).digest(), "little", signed=True)

    @property
    def sums(self) -> int:
        return self.rows + len(self.large)

    def touched(self, rows: Sequence[int], row_words: int) -> list[int]:
        """The items that these checksums are about, wholly or in part."""
        found = [number - self.rows + self.small for number in rows if number >= self.rows]
        for number in range(self.small):
            start, end = self.bounds[number], self.bounds[number + 1]
            if any(start < (row + 1) * row_words and end > row * row_words for row in rows):
                found.append(number)
        return sorted(found)


def message_layout(items: Sequence[Item], apart_bytes: float, row_words: int) -> MessageLayout:
    """Items of `apart_bytes` and more are large; a checksum is over `row_words` words of the small ones, or a large one."""
    sizes = [item.bytes for item in items]
    large = [number for number, size in enumerate(sizes) if size >= apart_bytes]
    order = [number for number, size in enumerate(sizes) if size < apart_bytes] + large
    small = len(order) - len(large)
    bounds = [0]
    for number in order[:small]:
        bounds.append(bounds[-1] + words(sizes[number]))
    rows = -(-bounds[-1] // row_words)
    places = [rows * row_words]
    for number in large:
        places.append(places[-1] + -(-words(sizes[number]) // _ALIGN_WORDS) * _ALIGN_WORDS)
    ordered = tuple(items[number] for number in order)
    told = ";".join(f"{item.name}{item.lo}{item.size}{item.destination.dtype}" for item in ordered)
    return MessageLayout(
        items=ordered,
        small=small,
        bounds=tuple(bounds),
        places=tuple(places),
        rows=rows,
        dtypes=tuple(getattr(torch, item.destination.dtype) for item in ordered),
        header=-(-(2 + rows + len(large)) // _ALIGN_WORDS) * _ALIGN_WORDS,
        payload_bytes=sum(sizes),
        digest=blake2b(told.encode()).digest(),
    )


def words(size: int) -> int:
    """64-bit words that hold so many bytes."""
    return (size + 7) // 8
