"""Deltas: the elements that changed since the last transfer, in fewer bytes than all of them; exact.

A delta is a sequence of bytes: four 64-bit numbers (form, elements, bytes of an element, changed elements), then sections,
each padded to whole words:

    MASK      a bit per element (element i at bit i % 8 of byte i // 8), the changed elements
    OFFSETS   changed elements in each block of 65,536 (int32), the place of each in its block (uint16), the elements
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK, OFFSETS = 1, 2
_HEADER_BYTES = 32
_BLOCK = 1 << 16
_CHUNK = 1 << 20
_GATHER_BITS = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, first lowest, in the top byte


def size(form: int, elements: int, changed: int, itemsize: int) -> int:
    """Bytes of a delta of this form."""
    return _HEADER_BYTES + sum(_whole_words(length) for length in _sections(form, elements, changed, itemsize))


def encode(now: Tensor, before: Tensor) -> Tensor | None:
    """The shortest delta (bytes,) uint8 from `before` to `now`; None where it would not be shorter than `now`.

    Both are (elements,) contiguous int16 or int32: floats' bits, so that a NaN equals itself and -0.0 is not 0.0.
    Waits for the device once, to learn how many changed.
    """
    assert now.dim() == 1 and now.shape == before.shape and now.dtype == before.dtype, "now and before differ in form"
    differ = _differing(now, before)
    elements, itemsize, changed = now.numel(), now.element_size(), int(torch.count_nonzero(differ))
    form = min((MASK, OFFSETS), key=lambda form: size(form, elements, changed, itemsize))
    length = size(form, elements, changed, itemsize)
    if length >= now.nbytes:
        return None
    data = torch.zeros(length, dtype=torch.uint8, device=now.device)
    data[:_HEADER_BYTES].view(torch.int64).copy_(torch.tensor([form, elements, itemsize, changed]))
    sections = _section_views(data, form, elements, changed, now.dtype)
    if form == MASK:
        sections[0].copy_(differ.view(torch.int64) * _GATHER_BITS >> 56)
        _select(now, differ, sections[1])
    else:
        place = differ.nonzero().view(-1)
        sections[0].copy_(torch.bincount(place >> 16, minlength=len(sections[0])))
        sections[1].copy_(place)  # its lowest 16 bits
        torch.index_select(now, 0, place, out=sections[2])
    return data


def apply(data: Tensor, onto: Tensor) -> int:
    """Turn the last transfer's elements into those that were encoded, in place. Returns how many changed.

    `data` may be longer than the delta, as a buffer is. RuntimeError where it is not a delta of such elements.
    """
    form, elements, itemsize, changed = data[:_HEADER_BYTES].view(torch.int64).tolist()
    if (
        (elements, itemsize) != (onto.numel(), onto.element_size())
        or form not in (MASK, OFFSETS)
        or not 0 <= changed <= elements
        or size(form, elements, changed, itemsize) > data.numel()
    ):
        raise RuntimeError(
            f"reshard: not a delta of {onto.numel()} elements of {onto.element_size()} bytes: its header says form "
            f"{form}, {elements} elements of {itemsize} bytes, {changed} of them changed, in {data.numel()} bytes"
        )
    sections = _section_views(data, form, elements, changed, onto.dtype)
    if form == MASK:
        spread = _spread_bits(onto.device)
        differ = torch.index_select(spread, 0, sections[0].to(torch.int32)).view(torch.bool)[:elements]
        onto.masked_scatter_(differ, sections[1])
    else:
        blocks = torch.arange(len(sections[0]), device=onto.device) * _BLOCK
        place = torch.repeat_interleave(blocks, sections[0].to(torch.int64), output_size=changed)
        onto.index_copy_(0, place + (sections[1].to(torch.int64) & (_BLOCK - 1)), sections[2])
    return changed


def _differing(now: Tensor, before: Tensor) -> Tensor:
    """Which elements differ: bool, padded with False to a multiple of eight."""
    differ = torch.zeros(_whole_words(now.numel()), dtype=torch.bool, device=now.device)
    torch.ne(now, before, out=differ[: now.numel()])
    return differ


def _select(now: Tensor, differ: Tensor, out: Tensor) -> None:
    """The elements that differ; by their places, since `torch.masked_select` takes twice the time on a CPU.

    In chunks: a place takes eight bytes.
    """
    filled = 0
    for chunk, which in zip(now.split(_CHUNK), differ.split(_CHUNK), strict=True):
        place = which.nonzero().view(-1)
        torch.index_select(chunk, 0, place, out=out[filled : filled + len(place)])
        filled += len(place)


def _spread_bits(device: torch.device) -> Tensor:
    """(256,) int64: a byte's bits as eight bytes of 0 or 1, the first lowest."""
    byte = torch.arange(256, device=device).view(-1, 1)
    return (byte >> torch.arange(8, device=device) & 1).to(torch.uint8).view(torch.int64).view(-1)


def _sections(form: int, elements: int, changed: int, itemsize: int) -> Sequence[int]:
    """Bytes of each section."""
    if form == MASK:
        return -(-elements // 8), changed * itemsize
    return -(-elements // _BLOCK) * 4, changed * 2, changed * itemsize


def _section_views(data: Tensor, form: int, elements: int, changed: int, dtype: torch.dtype) -> list[Tensor]:
    """Views of a delta's sections."""
    dtypes = {MASK: (torch.uint8, dtype), OFFSETS: (torch.int32, torch.int16, dtype)}[form]
    sections, start = [], _HEADER_BYTES
    for length, section_dtype in zip(_sections(form, elements, changed, dtype.itemsize), dtypes, strict=True):
        sections.append(data[start : start + length].view(section_dtype))
        start += _whole_words(length)
    return sections


def _whole_words(length: int) -> int:
    return -(-length // 8) * 8
