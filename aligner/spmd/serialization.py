"""Serialization of values: pickle protocol 5 with out-of-band buffers for CPU tensors, so a tensor costs one copy.

torch's own pickling writes each storage as a file of its own, some 0.1 ms a tensor.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
ALIGN = 64
"""Alignment of each part in its frame, in bytes: a received tensor is used in place."""


def serialize(value: Any) -> Bytes:
    """Serialize into a frame: the pickle, then the memory of each tensor and array."""
    stream = io.BytesIO()
    beside: list[pickle.PickleBuffer] = []
    _Pickler(stream, protocol=5, buffer_callback=beside.append).dump(value)
    return frame([stream.getbuffer(), *(part.raw() for part in beside)])


def deserialize(data: Bytes) -> Any:
    """Deserialize; tensors are views of `data`."""
    head, *beside = unframe(data)
    return pickle.loads(head.data, buffers=beside)


def frame(parts: Sequence[Bytes | memoryview]) -> Bytes:
    """Concatenate byte strings: their number and sizes (int64), then each part, aligned."""
    sizes = [part.nbytes for part in parts]
    chunks: list[Any] = [struct.pack(f"<{len(sizes) + 1}q", len(sizes), *sizes)]
    for part in parts:
        chunks += [bytes(-len(chunks[-1]) % ALIGN), part]
    return np.frombuffer(bytearray().join(chunks), np.uint8)


def unframe(whole: Bytes) -> list[Bytes]:
    """The parts of a frame, as views of it."""
    (count,) = struct.unpack_from("<q", whole.data)
    sizes = struct.unpack_from(f"<{count}q", whole.data, 8)
    return [whole[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True)]


def _starts(sizes: Sequence[int]) -> Iterator[int]:
    end = 8 * (len(sizes) + 1)
    for size in sizes:
        start = end + -end % ALIGN
        yield start
        end = start + size


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout is torch.strided:
            flat = obj.detach().contiguous().reshape(-1)
            memory: Any = flat.view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(memory), obj.dtype, tuple(obj.shape))
        return NotImplemented


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(dtype).reshape(shape)
