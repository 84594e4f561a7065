"""Messages and local copies: exact round trips, and every corruption named."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import inf

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aligner.reshard.message.bucket import LARGE_BYTES, Bucket, Buffers
from aligner.reshard.message.checksum import Hashes
from aligner.reshard.message.chunked_copy import ChunkBuffers
from aligner.reshard.message.proof import View
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.region import Piece, whole_tensor
from aligner.reshard.plan.transfer_plan import Item
from aligner.reshard.transfer.local_copy import copy_local
from tests.reshard.layouts import Grid, Shapes

CPU = torch.device("cpu")
SCRATCH = ChunkBuffers()
ROW_WORDS = Hashes.row_words
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES: Shapes = {
    "a": (33, 70), "b": (33, 70), "bias": (7,), "one": (1, 1), "scale": (), "cube": (3, 5, 4), "deep": (2, 3, 4, 5),
    "large": (300, 1001), "line": (200_003,),
}  # fmt: skip


class Pair:
    """Both ends of a transfer of whole tensors, stored in any strides with gaps between them."""

    def __init__(
        self, shapes: Shapes, from_dtype: str, to_dtype: str, seed: int = 0, apart: float = LARGE_BYTES
    ) -> None:
        draw = random.Random(seed)
        sources = Grid([0], 1, 1, from_dtype).layouts(shapes, draw)[0]
        targets = {piece.name: piece for piece in Grid([0], 1, 1, to_dtype).layouts(shapes, draw)[0]}
        self.items = [Item(piece.name, piece.lo, piece.size, piece, targets[piece.name]) for piece in sources]
        self.held, self.filled = allocate(sources, CPU), allocate(list(targets.values()), CPU)
        for number, storage in enumerate(self.held.values()):
            storage.copy_(torch.randn(storage.shape, generator=torch.Generator().manual_seed(number)))
        self.buffers = self._buffers(apart)

    def _buffers(self, apart: float) -> Buffers:
        made = Buffers(CPU)
        made.large_bytes = apart
        return made

    def source(self, piece: Piece) -> Tensor:
        return strided_view(self.held[piece.storage], piece)

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self.filled[piece.storage], piece)

    def sent(self, proof: bool = True, view: View | None = None) -> Bucket:
        """A bucket as it arrives: its parts in other memory, which held something else before."""
        apart = self.buffers.large_bytes
        packed, arrived = Bucket(self.items, self.buffers), Bucket(self.items, self._buffers(apart))
        packed.buffer.random_()
        arrived.bind_storages(view or self.view)
        packed = Bucket(self.items, self.reused(packed))
        packed.pack(self.source, proof)
        for here, there in zip(arrived.parts, packed.parts, strict=True):
            here.copy_(there)
        return arrived

    def reused(self, bucket: Bucket) -> Buffers:
        self.buffers.give(bucket)
        return self.buffers

    def assert_exact(self) -> None:
        for item in self.items:
            held, read = self.view(item.destination), self.source(item.source)
            bits = BITS[held.dtype]
            assert torch.equal(held.contiguous().view(bits), read.to(held.dtype).contiguous().view(bits)), item


@pytest.mark.parametrize("to_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("from_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("apart", [inf, LARGE_BYTES, 0])
def test_round_trip(apart: float, from_dtype: str, to_dtype: str) -> None:
    for seed in range(3):
        pair = Pair(SHAPES, from_dtype, to_dtype, seed, apart)
        bucket = pair.sent()
        assert not bucket.failed()
        bucket.unpack(pair.view, 0, 1, proof=True)
        pair.assert_exact()


@pytest.mark.parametrize("to_dtype", ["float32", "bfloat16"])
def test_local_copy(to_dtype: str) -> None:
    for seed in range(3):
        pair = Pair(SHAPES, "float32", to_dtype, seed)
        copy_local(pair.items, pair.source, pair.view, 3, True, SCRATCH)
        pair.assert_exact()


def test_no_items_and_no_proof() -> None:
    pair = Pair({}, "float32", "float32")
    bucket = pair.sent()
    bucket.unpack(pair.view, 0, 1, proof=True)
    copy_local([], pair.source, pair.view, 0, True, SCRATCH)
    plain = Pair(SHAPES, "float32", "bfloat16")
    plain.sent(proof=False).unpack(plain.view, 0, 1, proof=False)
    plain.assert_exact()


def test_a_failed_bucket_says_so() -> None:
    pair = Pair(SHAPES, "float32", "float32")
    bucket = pair.sent()
    bucket.mark_failed()
    assert bucket.failed()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_negative_zero_are_compared_as_bits(dtype: str) -> None:
    shapes = {"w": (40, 30)}
    pair = Pair(shapes, dtype, dtype)
    storage = next(iter(pair.held.values()))
    storage[::3], storage[1::3] = float("nan"), -0.0
    pair.sent().unpack(pair.view, 0, 1, proof=True)
    pair.assert_exact()
    copy_local(pair.items, pair.source, pair.view, 0, True, SCRATCH)
    pair.assert_exact()
    harmed = Harmed(pair, positive, "w")
    with pytest.raises(RuntimeError, match="mismatch in w"):
        pair.sent(view=harmed).unpack(harmed, 0, 1, proof=True)


def contents(bucket: Bucket) -> Iterator[tuple[Item, Tensor]]:
    """Each item and the bytes that arrived of it."""
    start, large = 0, iter(bucket.parts[1:])
    for item in bucket.items:
        if start < bucket.payload.numel():
            yield item, bucket.payload.view(torch.uint8)[8 * start : 8 * start + item.bytes]
            start += -(-item.bytes // 8)
        else:
            yield item, next(large).view(-1).view(torch.uint8)


@pytest.mark.parametrize("apart", [inf, LARGE_BYTES, 0])
@pytest.mark.parametrize("to_dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_in_the_message_is_named(to_dtype: str, apart: float) -> None:
    pair = Pair(SHAPES, "float32", to_dtype, apart=apart)
    seen = set()
    for number in range(len(pair.items)):
        for place in (0, 1 / 2, 1):
            bucket = pair.sent()
            item, data = list(contents(bucket))[number]
            byte = int(place * (item.bytes - 1))
            data[byte] ^= 1 << (number % 8)
            said = r"from rank 4 to rank 5: (the message|after the write \S+) does"
            with pytest.raises(RuntimeError, match=said) as error:
                bucket.unpack(pair.view, 4, 5, proof=True)
            together = [one for one in bucket.items if one.bytes < apart]
            row = (data.data_ptr() + byte - bucket.payload.data_ptr()) // 8 // ROW_WORDS
            named = touching(together, row) if item in together else [item]
            assert any(str(one) in str(error.value) for one in named)
            seen.add("the message does not" in str(error.value))
    assert seen == ({True} if apart == inf else {True, False}), "storages are strided, and lie in a row"
    pair.sent().unpack(pair.view, 4, 5, proof=True)
    pair.assert_exact()


def touching(items: list[Item], row: int) -> list[Item]:
    found, start = [], 0
    for item in items:
        end = start + (item.bytes + 7) // 8
        if start < (row + 1) * ROW_WORDS and end > row * ROW_WORDS:
            found.append(item)
        start = end
    return found


@pytest.mark.parametrize("apart", [inf, LARGE_BYTES])
def test_a_flipped_bit_in_the_header_is_seen(apart: float) -> None:
    pair = Pair(SHAPES, "float32", "float32", apart=apart)
    bucket = pair.sent()
    together = sum((item.bytes + 7) // 8 for item in pair.items if item.bytes < apart)
    rows = -(-together // ROW_WORDS) + sum(item.bytes >= apart for item in pair.items)
    for word in range(2 + rows):
        for bit in (0, 17, 63):
            flip = -(1 << 63) if bit == 63 else 1 << bit
            bucket.words[word] ^= flip
            with pytest.raises(RuntimeError, match="from rank 0 to rank 1"):
                bucket.unpack(pair.view, 0, 1, proof=True)
            bucket.words[word] ^= flip


def test_a_message_of_other_regions_is_seen() -> None:
    """Two experts of one shape that changed places in the plan of one end."""
    pair = Pair({"expert0": (8, 8), "expert1": (8, 8)}, "float32", "float32")
    bucket = Bucket(pair.items, pair.buffers)
    bucket.pack(pair.source, True)
    other = Bucket(pair.items[::-1], pair.buffers)
    other.words.copy_(bucket.words)
    with pytest.raises(RuntimeError, match=r"is not one of 2 regions from expert1\[0:8, 0:8\] on"):
        other.unpack(pair.view, 0, 1, proof=True)
    assert not any(storage.any() for storage in pair.filled.values())


def flipped(*tensors: Tensor) -> None:
    tensors[0].view(BITS[tensors[0].dtype])[-1, -1] ^= 1


def positive(*tensors: Tensor) -> None:
    tensors[0][tensors[0] == 0] = 0.0


def stale(*tensors: Tensor) -> None:
    """What the last transfer wrote, a rounding step or two away."""
    tensors[0].mul_(1 + 2.0**-7)


def swapped(one: Tensor, two: Tensor) -> None:
    kept = one.clone()
    one.copy_(two)
    two.copy_(kept)


def skipped(*tensors: Tensor) -> None:
    tensors[0].zero_()


class Harmed:
    """Views of a pair's storages; looked up again, each is that of a copy: all right, but for harm to some tensors."""

    def __init__(self, pair: Pair, harm: Callable[..., None], *names: str) -> None:
        self._pair, self._seen = pair, set[Piece]()
        copy_local(pair.items, pair.source, pair.view, 0, False, SCRATCH)
        self._copies = {name: storage.clone() for name, storage in pair.filled.items()}
        pieces = {item.name: item.destination for item in pair.items}
        harm(*(strided_view(self._copies[pieces[name].storage], pieces[name]) for name in names))

    def __call__(self, piece: Piece) -> Tensor:
        again = piece in self._seen
        self._seen.add(piece)
        return strided_view(self._copies[piece.storage], piece) if again else self._pair.view(piece)


@pytest.mark.parametrize("to_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [33, 4000])
@pytest.mark.parametrize("harm", [flipped, stale, swapped, skipped])
def test_a_wrong_storage_is_named(to_dtype: str, rows: int, harm: Callable[..., None]) -> None:
    """Small tensors, and some of several chunks."""
    shapes = {"before": (9,), "expert1": (rows, 70), "expert2": (rows, 70), "after": (5, 5)}
    told = rf"mismatch in expert1\[0:{rows}, 0:70\] from rank {{}} to rank 3: after the write \S+ does not hold .*"
    told += rf"\({2 if harm is swapped else 1} of 4 regions"
    pair = Pair(shapes, "float32", to_dtype)
    harmed = Harmed(pair, harm, "expert1", "expert2")
    with pytest.raises(RuntimeError, match=told.format(2)):
        pair.sent(view=harmed).unpack(harmed, 2, 3, proof=True)
    with pytest.raises(RuntimeError, match=told.format(3)):
        copy_local(pair.items, pair.source, Harmed(pair, harm, "expert1", "expert2"), 3, True, SCRATCH)


@pytest.mark.parametrize("apart", [inf, 0])
def test_only_what_is_right_so_far_is_told_as_written(apart: float) -> None:
    """Of a message and of local copies: every item once; where one is wrong neither it nor what comes after it."""
    shapes = {"first": (40, 30), "second": (40, 30), "third": (40, 30)}
    for wrong in (None, "second"):
        pair = Pair(shapes, "float32", "float32", apart=apart)
        views = [Harmed(pair, flipped, wrong) if wrong else pair.view for _ in range(2)]
        arrived, names = pair.sent(view=views[0]), list[str]()

        def told(items: Sequence[Item], names: list[str] = names) -> None:
            names.extend(item.name for item in items)

        right = [] if wrong and apart == inf else ["first"] if wrong else list(shapes)
        with pytest.raises(RuntimeError, match="mismatch in second") if wrong else nullcontext():
            arrived.unpack(views[0], 0, 1, True, told)
        assert names == right
        names.clear()
        with pytest.raises(RuntimeError, match="mismatch in second") if wrong else nullcontext():
            copy_local(pair.items, pair.source, views[1], 0, True, SCRATCH, told)
        assert names == (["first"] if wrong else list(shapes))


def test_a_wrong_message_is_told_before_a_wrong_storage() -> None:
    pair = Pair({"w": (40, 30)}, "float32", "float32")
    bucket = pair.sent()
    bucket.words[-1] ^= 1
    with pytest.raises(RuntimeError, match="the message does not hold"):
        bucket.unpack(Harmed(pair, flipped, "w"), 0, 1, proof=True)


@pytest.mark.parametrize("seed", range(3))
def test_every_single_bit_of_a_write_matters(seed: int) -> None:
    """One bit anywhere in items of many chunks and strides, seen in the item it is in."""
    draw = random.Random(seed)
    pair = Pair({**SHAPES, "wide": (700, 1003)}, "float32", "bfloat16", seed)
    for _ in range(6):
        item = draw.choice(pair.items)
        at, bit = [draw.randrange(extent) for extent in item.size], draw.randrange(15)

        def harm(tensor: Tensor, at: list[int] = at, bit: int = bit) -> None:
            tensor.view(torch.int16)[tuple(at)] ^= 1 << bit

        harmed = Harmed(pair, harm, item.name)
        with pytest.raises(RuntimeError, match=re.escape(f"mismatch in {item} from rank 0 to rank 1: after the write")):
            pair.sent(view=harmed).unpack(harmed, 0, 1, proof=True)


@pytest.mark.parametrize(
    ("stride", "to_dtype"), [((4096, 1), "float32"), ((4096, 1), "bfloat16"), ((1, 1024), "float32")]
)
def test_a_local_copy_takes_little_memory(stride: tuple[int, int], to_dtype: str) -> None:
    """16 MiB and more, rows, columns of a wider tensor and a transposed one: never more than a chunk or two beside."""
    piece = Piece("w", (0, 0), (1024, 4096), "from", 0, stride, "float32")
    item = Item("w", (0, 0), (1024, 4096), piece, whole_tensor("w", (1024, 4096), to_dtype))
    held, filled = torch.randn(1024 * 4096), torch.zeros(1024, 4096, dtype=getattr(torch, to_dtype))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        copy_local([item], lambda p: strided_view(held, p), lambda p: strided_view(filled, p), 0, True, SCRATCH)
    sizes = [event.cpu_memory_usage for event in seen.events()]
    assert max(sizes) <= 1 << 20
    assert torch.equal(filled, held.as_strided((1024, 4096), stride).to(filled.dtype))
