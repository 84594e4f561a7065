"""Run by test_cuda_standins.py with TRITON_INTERPRET=1: the draws of vLLM's second model runner, by its own kernel."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl


def kernel() -> Any:
    """vLLM's module; without a GPU vLLM hides Triton from it."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # type: ignore[union-attr, index]
    sys.modules["vllm.triton_utils"] = types.ModuleType("vllm.triton_utils")
    sys.modules["vllm.triton_utils"].__dict__.update(tl=tl, triton=triton)
    sys.modules.setdefault("vllm", types.ModuleType("vllm"))
    spec = importlib.util.spec_from_file_location("gumbel", folder / "v1/worker/gpu/sample/gumbel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gumbel"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    draw = kernel().gumbel_sample
    rows, vocabulary = 5, 40
    torch.manual_seed(0)
    logits, seeds = torch.randn(rows, vocabulary), torch.tensor([7, 7, 2**62 + 1, 9, 9])
    positions, ones = torch.tensor([3, 4, 3, 3, 3]), torch.ones(rows)

    def drawn(which: list[int]) -> list[int]:
        place = torch.arange(len(which), dtype=torch.int32)
        found = draw(
            logits[which].clone(),
            place,
            ones[which],
            seeds[which],
            positions[which],
            apply_temperature=False,
            is_drafting=False,
        )
        return found.tolist()  # type: ignore[no-any-return]

    together = drawn(list(range(rows)))
    assert [drawn([row])[0] for row in range(rows)] == together, "a draw depends on nothing else in the batch"
    assert drawn([4, 0, 2]) == [together[4], together[0], together[2]], "nor on its row"
    logits[:] = logits[0]
    same = drawn(list(range(rows)))
    assert same[3] == same[4], "the same seed and position"
    seeds, positions = torch.arange(400), torch.full((400,), 5)
    logits, ones = torch.tensor([[0.0, 1.0, 2.0]]).expand(400, 3).contiguous(), torch.ones(400)
    shares = torch.bincount(torch.tensor(drawn(list(range(400)))), minlength=3) / 400
    assert (shares - torch.tensor([0.0, 1.0, 2.0]).softmax(0)).abs().max() < 0.08, shares
    print("equal")


if __name__ == "__main__":
    main()
