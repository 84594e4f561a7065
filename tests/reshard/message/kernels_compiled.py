"""Run by test_kernels.py: the kernels compiled to machine code for sm_80, sm_90 and sm_100, which needs no device."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aligner.reshard.message import kernels_triton as kernels
from aligner.reshard.message import quantize_triton

PAYLOAD = {0: "*i32", 1: "*i16", 2: "*i16", 3: "*i8"}
WEIGHTS = {"byte_weight": "*i8", "cell_weight": "*i64"}


def build(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, int], capability: int) -> None:
    signature = types | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]


def main() -> None:
    moves = [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 2, 1),
        (1, 0, 0),
        (1, 1, 1),
        (2, 1, 1),
        (0, 3, 3),
        (1, 3, 3),
        (2, 3, 3),
    ]
    for capability in (80, 90, 100):
        for what, held, packed in moves if capability == 90 else moves[1:2]:
            types = {"table": "*i64", "segments": "*i64", "payload": PAYLOAD[packed]}
            types |= {"result": "*i32" if what == 2 else PAYLOAD[packed] if what == 1 else "*i64"} | WEIGHTS
            constants = {"OPERATION": what, "HELD": held, "PACKED": packed, "FIELDS": 10, "TILE": 1024}
            build(kernels._move, types, constants, capability)
        build(kernels._row_sums, {"payload": "*i32", "sums": "*i64"} | WEIGHTS, {"TILE": 1024}, capability)
        for held in ("*fp32", "*bf16", "*fp16"):
            types = {"weight": held, "fp8": "*u8", "scales": "*fp32"}
            types |= dict.fromkeys(("rows", "columns", "row_stride", "column_stride"), "i32")
            build(quantize_triton._quantize, types, {"CASTS": True}, capability)
    print("compiled")


if __name__ == "__main__":
    main()
