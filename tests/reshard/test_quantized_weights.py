"""A transfer to FP8: what arrives is the whole tensor's quantization, however either end is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.quantize import quantize_blocks
from aligner.reshard.message.storage import allocate, strided_view
from aligner.reshard.plan.block_scales import QuantizedDestination, QuantizedSource, scale_shapes
from aligner.reshard.plan.layout import ExplicitLayout
from aligner.reshard.plan.region import Layout, Piece, whole_tensor
from aligner.reshard.plan.schedule import make_schedule
from aligner.reshard.plan.transfer_plan import plan_transfer
from aligner.reshard.quantized_weights import QuantizedWeights

SETTING = "rollout.quantization=fp8"
SHAPES = {"k": (512, 256), "o": (256, 512), "norm": (256,)}
QUANTIZED = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
K, NORM = whole_tensor("k", (512, 256), "bfloat16"), whole_tensor("norm", (256,), "bfloat16")
OUT = whole_tensor("o", (256, 512), "bfloat16")


def rows(piece: Piece, start: int, count: int, storage: str, at: int = 0) -> Piece:
    """Some rows of a piece, from row `at` of a storage of its own on."""
    width = piece.size[1]
    return Piece(piece.name, (start, 0), (count, width), storage, at * width, (width, 1), piece.dtype)


def columns(piece: Piece, start: int, count: int, storage: str) -> Piece:
    return Piece(piece.name, (0, start), (piece.size[0], count), storage, 0, (count, 1), piece.dtype)


# As Megatron's fused projection keeps heads of 64 rows: each in a place of its own, two make a block.
HEADS = {
    rank: [rows(K, 256 * rank + 64 * head, 64, "qkv", 100 * head) for head in range(4)]
    + [columns(OUT, 256 * rank, 256, "proj"), NORM]
    for rank in (0, 1)
}
WHOLE = {0: [K, OUT, NORM]}
# An engine that stacks k below 128 rows of something else.
ENGINE = {
    rank: [rows(K, 128 * (rank - 2), 128, "qkv", 128), columns(OUT, 128 * (rank - 2), 128, "o"), NORM] for rank in (2, 3, 4, 5)
}  # fmt: skip
ENGINE_WHOLE = {2: [rows(K, 0, 512, "qkv", 128), OUT, NORM]}


class Held:
    """One rank's end of a transfer, in memory."""

    def __init__(self, rank: int, layouts: Mapping[int, Layout], layout: Any = None) -> None:
        self.layout = layout or ExplicitLayout(layouts)
        self._pieces = list(self.layout.layout(rank))
        self.storages = allocate(self._pieces, torch.device("cpu"))

    def pieces(self) -> Layout:
        return self._pieces

    def view(self, piece: Piece) -> Tensor:
        return strided_view(self.storages[piece.storage], piece)


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in SHAPES.items()}


def cut(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[tuple(slice(low, low + extent) for low, extent in zip(piece.lo, piece.size, strict=True))]


@pytest.mark.parametrize("held", [HEADS, WHOLE], ids=["heads on two ranks", "whole"])
@pytest.mark.parametrize("wanted", [ENGINE, ENGINE_WHOLE], ids=["four engine ranks", "one engine rank"])
@pytest.mark.parametrize("bucket", [1 << 20, 5000], ids=["large messages", "messages that cut blocks"])
def test_what_arrives_is_the_quantization_of_the_whole(
    held: dict[int, Layout], wanted: dict[int, Layout], bucket: int
) -> None:
    values, sources = tensors(), {}
    for rank in held:
        plain = Held(rank, held)
        for piece in plain.pieces():
            plain.view(piece).copy_(cut(values[piece.name], piece))
        sources[rank] = QuantizedWeights(plain, QUANTIZED, SETTING)
        assert list(sources[rank].pieces()) == list(sources[rank].layout.layout(rank))
    destination = QuantizedDestination(ExplicitLayout(wanted), QUANTIZED, SETTING)
    ends = {rank: Held(rank, wanted, destination) for rank in wanted}
    carry(sources, ends, bucket)
    expected = dict(values)
    for name in QUANTIZED:
        expected[name], expected[f"{name}_scale_inv"] = quantize_blocks(values[name])
    for rank, end in ends.items():
        assert {piece.dtype for piece in end.pieces()} == {"float8_e4m3fn", "float32", "bfloat16"}
        for piece in end.pieces():
            assert torch.equal(end.view(piece).float(), cut(expected[piece.name].float(), piece)), (rank, piece)


def carry(sources: Mapping[int, Any], ends: Mapping[int, Held], bucket: int) -> None:
    """Every message of the plan, packed at its sender, unpacked and proven at its receiver."""
    source, destination = next(iter(sources.values())).layout, next(iter(ends.values())).layout
    plans = {rank: plan_transfer(rank, source, destination) for rank in (*sources, *ends)}
    schedules = {rank: make_schedule(plan, bucket) for rank, plan in plans.items()}
    buffers = Buffers(torch.device("cpu"))
    in_transit: dict[Any, Bucket] = {}
    pending = [message for rank in ends for step in schedules[rank].steps if (message := step.receive)]
    sizes = 0
    for message in sorted(pending, key=lambda message: message.label):
        if message.relay:
            sent = in_transit[message.content]
        else:
            sent = Bucket(schedules[message.sender].items(message), buffers)
            sent.pack(sources[message.sender].view, True)
        arrived = Bucket(schedules[message.receiver].items(message), buffers)
        view = ends[message.receiver].view
        arrived.bind_storages(view)
        for part, received in zip(sent.parts, arrived.parts, strict=True):
            received.copy_(part)
        arrived.unpack(view, message.sender, message.receiver, True)
        in_transit[message.content] = arrived
        sizes += arrived.payload_bytes
    weights = sum(piece.elements for end in ends.values() for piece in end.pieces() if piece.dtype == "float8_e4m3fn")
    norms = len(ends) * 256 * 2
    assert sizes == weights + weights // (128 * 128) * 4 + norms, "a byte for each weight, four for each block"


def test_layouts_by_rank_and_by_tensor_say_the_same() -> None:
    for layout in (
        QuantizedSource(ExplicitLayout(HEADS), QUANTIZED, SETTING),
        QuantizedDestination(ExplicitLayout(ENGINE), QUANTIZED, SETTING),
    ):
        by_tensor = {
            (rank, piece)
            for name in (*SHAPES, *scale_shapes(QUANTIZED))
            for piece, ranks in layout.holders(name)
            for rank in ranks
        }
        assert by_tensor == {(rank, piece) for rank in layout.ranks for piece in layout.layout(rank)}
    assert scale_shapes(QUANTIZED) == {"k_scale_inv": (4, 2), "o_scale_inv": (2, 4)}
    # 128 rows of something else above: the scales of k begin in row 1 of 2 columns.
    scales = next(
        piece
        for piece in QuantizedDestination(ExplicitLayout(ENGINE), QUANTIZED, SETTING).layout(3)
        if piece.name == "k_scale_inv"
    )
    assert (scales.storage, scales.offset, scales.stride, scales.lo, scales.size) == (
        "qkv_scale_inv",
        2,
        (1, 1),
        (1, 0),
        (1, 2),
    )


@pytest.mark.parametrize(
    "layouts",
    [
        {0: [rows(K, 0, 64, "k")], 1: [rows(K, 64, 448, "k")]},
        {0: [columns(K, 0, 192, "k")], 1: [columns(K, 192, 64, "k")]},
    ],
    ids=["rows", "columns"],
)
def test_a_rank_with_a_part_of_a_block_is_refused_everywhere(layouts: dict[int, Layout]) -> None:
    for rank in layouts:
        with pytest.raises(
            ValueError, match=r"rollout\.quantization=fp8 scales blocks of 128 x 128.* k\[0:.* of 512x256"
        ):
            QuantizedWeights(Held(rank, layouts), {"k": (512, 256)}, SETTING)


def test_an_engine_that_stacks_blocks_unaligned_is_refused() -> None:
    shifted = ExplicitLayout({0: [replace(K, offset=64 * 256)]})
    with pytest.raises(ValueError, match="whole blocks"):
        QuantizedDestination(shifted, QUANTIZED, SETTING).check()
