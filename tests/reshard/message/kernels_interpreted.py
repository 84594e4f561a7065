"""Run by test_kernels.py with TRITON_INTERPRET=1: the kernels against torch, bit for bit."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from aligner.reshard.message.bucket import Bucket, Buffers
from aligner.reshard.message.checksum import ROW_WORDS, Sums
from aligner.reshard.message.kernels_triton import Kernels
from aligner.reshard.message.quantize import block_scales, quantize_blocks, quantize_by_torch
from tests.reshard.message.test_bucket import Harmed, Pair, flipped
from tests.reshard.message.test_quantize import matrices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def views(device: torch.device, seed: int) -> list[Tensor]:
    """Scalars, odd lines, column slices, transposed and permuted tensors of up to five dimensions, in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    shapes = [
        draw(), draw(1), draw(7), draw(3, 5), draw(20, 90)[:, 17:50], draw(30, 40).t(), draw(4, 5, 7).permute(2, 0, 1),
        draw(3, 4, 5, 6), draw(3, 4, 5, 6).permute(3, 1, 0, 2), draw(2, 3, 2, 5, 3).transpose(0, 4)[:, 1:], draw(5001),
    ]  # fmt: skip
    found = [view.to(dtype) for view, dtype in zip(shapes, itertools.cycle(DTYPES), strict=False)]
    special = torch.tensor(
        [0.0, -0.0, 1.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 65519.0, 3e38]
    )
    return [*found, special.to(device), special.to(device, torch.float16)]


def padded_bounds(sizes: list[int]) -> list[int]:
    return [0, *itertools.accumulate((size + 7) // 8 for size in sizes)]


def check(device: torch.device, seed: int) -> None:
    held = views(device, seed)
    dtypes = [DTYPES[(number + seed) % 3] for number in range(len(held))]
    bounds = padded_bounds([view.numel() * dtype.itemsize for view, dtype in zip(held, dtypes, strict=True)])
    rows = -(-bounds[-1] // ROW_WORDS)
    payload = torch.full((rows * ROW_WORDS,), -1, dtype=torch.int64, device=device)
    payload[bounds[-1] :] = 0
    kernels, sums = Kernels(device), torch.full((rows,), 99, dtype=torch.int64, device=device)
    kernels.pack(held, dtypes, payload, bounds, sums)
    expected = torch.zeros_like(payload)
    for view, dtype, start in zip(held, dtypes, bounds, strict=False):
        expected[start:].view(dtype)[: view.numel()] = view.to(dtype).contiguous().view(-1)
    assert torch.equal(payload, expected)
    cpu = Sums(torch.device("cpu")).rows(expected.cpu())
    assert sums.tolist() == kernels.rows(payload).tolist() == cpu.tolist()

    filled = [torch.empty_strided(view.shape, view.stride(), dtype=dtype, device=device).fill_(5.0)
              for view, dtype in zip(held, dtypes, strict=True)]  # fmt: skip
    kernels.unpack(filled, payload, bounds)
    for view, other in zip(filled, held, strict=True):
        bits = BITS[view.dtype]
        assert torch.equal(view.contiguous().view(bits), other.to(view.dtype).contiguous().view(bits))
    assert not kernels.differs(filled, payload, bounds).any()
    for number in range(seed, len(filled), 5):
        view = filled[number]
        last = view[tuple(size - 1 for size in view.shape)].view(BITS[view.dtype])
        last ^= 1
        assert kernels.differs(filled, payload, bounds).nonzero().view(-1).tolist() == [number]
        last ^= 1


def nan(device: torch.device) -> None:
    """A NaN stays one in every cast, and keeps its bits where there is none."""
    line = torch.tensor([float("nan"), 1.0, -float("nan")], device=device)
    odd = torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32, device=device).view(torch.float32)
    for dtype in DTYPES:
        payload = torch.zeros(ROW_WORDS, dtype=torch.int64, device=device)
        sums = torch.zeros(1, dtype=torch.int64, device=device)
        Kernels(device).pack([line, odd], [dtype, dtype], payload, [0, 2], sums)
        assert payload.view(dtype)[:3].isnan().tolist() == [True, False, True]
        assert payload[2:].view(dtype)[:3].isnan().all()
        if dtype == torch.float32:
            assert torch.equal(payload[2:].view(torch.int32)[:3], odd.view(torch.int32))


def buckets(device: torch.device) -> None:
    """A bucket through the kernels is word for word the one that torch packs; what is written is proven, harm is not."""
    pair = Pair({"a": (33, 70), "bias": (7,), "scale": (), "deep": (2, 3, 4, 5)}, "float32", "bfloat16")
    pair.held = {name: storage.to(device) for name, storage in pair.held.items()}
    pair.filled = {name: storage.to(device) for name, storage in pair.filled.items()}
    fused, plain = (Bucket(pair.items, Buffers(device)) for _ in range(2))
    assert fused._kernels is not None
    plain._kernels = None
    for bucket in (fused, plain):
        bucket.pack(pair.source, True)
    assert torch.equal(fused._payload, plain._payload) and torch.equal(fused._sums, plain._sums)
    for bucket in (fused, plain):
        bucket.unpack(pair.view, 0, 1, proof=True)
        pair.assert_exact()
        with pytest.raises(RuntimeError, match=r"mismatch in deep\[.* from rank 0 to rank 1: after the write"):
            bucket.unpack(Harmed(pair, flipped, "deep"), 0, 1, proof=True)
        bucket.words[-1] ^= 1
        with pytest.raises(RuntimeError, match="the message does not hold"):
            bucket.unpack(pair.view, 0, 1, proof=True)


def fp8_moves(device: torch.device) -> None:
    """FP8 weights are packed, summed, written and compared as the bytes that they are."""
    held = torch.arange(300 * 70, device=device).view(300, 70).to(torch.uint8).view(torch.float8_e4m3fn)
    views, dtypes = [held, held[3:9, 5:8]], [torch.float8_e4m3fn] * 2
    bounds = padded_bounds([view.numel() for view in views])
    rows = -(-bounds[-1] // ROW_WORDS)
    payload = torch.zeros(rows * ROW_WORDS, dtype=torch.int64, device=device)
    sums = torch.zeros(rows, dtype=torch.int64, device=device)
    kernels = Kernels(device)
    kernels.pack(views, dtypes, payload, bounds, sums)
    for view, start in zip(views, bounds, strict=False):
        assert torch.equal(payload[start:].view(torch.uint8)[: view.numel()], view.view(torch.uint8).reshape(-1))
    assert sums.tolist() == kernels.rows(payload).tolist() == Sums(torch.device("cpu")).rows(payload.cpu()).tolist()
    filled = [torch.zeros(view.shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn) for view in views]
    kernels.unpack(filled, payload, bounds)
    assert torch.equal(filled[1].view(torch.uint8), views[1].view(torch.uint8))
    assert not kernels.differs(filled, payload, bounds).any()
    filled[1].view(torch.uint8)[2, 1] ^= 1
    assert kernels.differs(filled, payload, bounds).tolist() == [0, 1]


def quantized(device: torch.device) -> None:
    """The kernel of FP8 blocks against torch on the CPU, bit for bit; only which bits a NaN has is open."""
    weights = matrices()
    weights["no numbers"] = torch.ones(130, 260)
    weights["no numbers"][[3, 129], [5, 200]] = torch.tensor([float("nan"), -float("inf")])
    for name, weight in weights.items():
        expected, expected_scales = quantize_by_torch(weight)
        on_device = weight.to(device)
        fp8, scales = quantize_blocks(on_device)
        assert torch.equal(block_scales(on_device).view(torch.int32), scales.view(torch.int32)), name
        same = fp8.cpu().view(torch.uint8) == expected.view(torch.uint8)
        assert bool((same | (fp8.cpu().float().isnan() & expected.float().isnan())).all()), name
        assert torch.equal(scales.cpu().nan_to_num(-1.0), expected_scales.nan_to_num(-1.0)), name


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    for seed in range(3):
        check(where, seed)
    nan(where)
    buckets(where)
    fp8_moves(where)
    quantized(where)
    print("equal")
