"""Values as bytes: a pickle with every CPU tensor's memory beside it, so that a tensor costs a copy and no more.

torch's own pickling writes each storage as a file of its own, some 0.1 ms a tensor.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
ALIGN = 64
"""Every part starts at a multiple of so many bytes of its frame: a tensor is used where it arrived."""


def pack(value: Any) -> Bytes:
    """A frame: the pickle, then the memory of each tensor and array in it."""
    stream = io.BytesIO()
    beside: list[pickle.PickleBuffer] = []
    _Pickler(stream, protocol=5, buffer_callback=beside.append).dump(value)
    return frame([np.frombuffer(stream.getbuffer(), np.uint8), *(np.frombuffer(b.raw(), np.uint8) for b in beside)])


def unpack(data: Bytes) -> Any:
    """The value; its tensors are views of `data`."""
    head, *beside = unframe(data)
    return pickle.loads(head.data, buffers=beside)


def frame(parts: Sequence[Bytes]) -> Bytes:
    """Several byte strings as one: their number and sizes (int64), then each, aligned."""
    sizes = np.array([len(parts), *(part.size for part in parts)], np.int64)
    starts = _starts(sizes)
    whole = np.empty(starts[-1], np.uint8)
    whole[: sizes.nbytes] = sizes.view(np.uint8)
    for start, part in zip(starts[:-1], parts, strict=True):
        whole[start : start + part.size] = part
    return whole


def unframe(whole: Bytes) -> list[Bytes]:
    """The parts of a frame, as views of it."""
    count = int(whole[:8].view(np.int64)[0])
    sizes = whole[: 8 * (count + 1)].view(np.int64)
    return [whole[start : start + size] for start, size in zip(_starts(sizes)[:-1], sizes[1:].tolist(), strict=True)]


def _starts(sizes: NDArray[np.int64]) -> list[int]:
    """Where each part starts, and where the frame ends."""
    padded = -(-np.concatenate([[sizes.nbytes], sizes[1:]]) // ALIGN) * ALIGN
    found: list[int] = np.cumsum(padded).tolist()
    return found


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout is torch.strided:
            flat = obj.detach().contiguous().reshape(-1)
            return _tensor, (pickle.PickleBuffer(flat.view(torch.uint8).numpy()), obj.dtype, tuple(obj.shape))
        return NotImplemented


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(dtype).reshape(shape)
