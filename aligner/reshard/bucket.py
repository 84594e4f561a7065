"""One message: a status word, a checksum per item, and the items' elements packed in the destination's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aligner.reshard.checksum import Checksum
from aligner.reshard.plan import Item
from aligner.reshard.region import Piece

_OK, _FAILED = 0, 1


class Buffers:
    """Message buffers, used again within a transfer: fresh memory costs a page fault every 4 KiB written."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: list[Tensor] = []

    def take(self, words: int) -> Tensor:
        """A buffer of at least `words` 64-bit words: the smallest spare one that is large enough, else a new one."""
        fits = [place for place, spare in enumerate(self._spare) if spare.numel() >= words]
        if fits:
            return self._spare.pop(min(fits, key=lambda place: self._spare[place].numel()))
        if self._spare:
            self._spare.pop()  # outgrown: the new one takes its place, so that the spares stay few
        return torch.empty(words, dtype=torch.int64, device=self.device)

    def give(self, bucket: Bucket) -> None:
        """Take back the buffer of a bucket that was sent or applied."""
        self._spare.append(bucket.buffer)


class Bucket:
    """A buffer of 64-bit words laid out as [status, checksum per item, items, each padded to whole words]."""

    def __init__(self, items: Sequence[Item], buffers: Buffers) -> None:
        self.items = tuple(items)
        self._bounds = [1 + len(self.items)]
        for item in self.items:
            self._bounds.append(self._bounds[-1] + (item.bytes + 7) // 8)
        self.buffer = buffers.take(self._bounds[-1])
        self.words = self.buffer[: self._bounds[-1]]

    def pack(self, source: Callable[[Piece], Tensor], checksum: Checksum | None) -> None:
        """Read every item from the source, cast it, and checksum the result."""
        for number, item in enumerate(self.items):
            words = self._words(number)
            words[-1:] = 0  # padding takes part in the checksum
            self._elements(number).copy_(_checked(source(item.source), item))
            if checksum is not None:
                self.words[1 + number] = checksum.words(words)
        self.words[0] = _OK

    def write(self, view: Callable[[Piece], Tensor]) -> None:
        """Write every item into the destination's storages."""
        for number, item in enumerate(self.items):
            _checked(view(item.destination), item).copy_(self._elements(number))

    def prove(self, view: Callable[[Piece], Tensor], checksum: Checksum, by: int, to: int) -> None:
        """Read every item back from the destination's storages and compare with the source's checksums.

        Overwrites the packed elements. RuntimeError names the first item that differs.
        """
        found = []
        for number, item in enumerate(self.items):
            self._elements(number).copy_(view(item.destination))
            found.append(checksum.words(self._words(number)))
        # One comparison per bucket: on CUDA each would cost a synchronisation.
        wrong = (torch.stack(found) != self.words[1 : 1 + len(found)]).nonzero().view(-1).tolist()
        if wrong:
            item = self.items[wrong[0]]
            raise RuntimeError(
                f"reshard: checksum mismatch in {item} from rank {by} to rank {to}: after the write "
                f"{item.destination.storage} does not hold what {item.source.storage} held "
                f"({len(wrong)} of {len(found)} regions in this bucket differ)"
            )

    def mark_failed(self) -> None:
        """Tell the receiver not to use this bucket."""
        self.words.zero_()
        self.words[0] = _FAILED

    def failed(self) -> bool:
        return int(self.words[0]) != _OK

    def _words(self, number: int) -> Tensor:
        return self.words[self._bounds[number] : self._bounds[number + 1]]

    def _elements(self, number: int) -> Tensor:
        item = self.items[number]
        dtype: torch.dtype = getattr(torch, item.destination.dtype)
        return self._words(number).view(dtype)[: item.destination.elements].view(item.size)


def _checked(tensor: Tensor, item: Item) -> Tensor:
    assert tensor.shape == item.size, f"{item}: got a view of shape {tuple(tensor.shape)}"
    return tensor
