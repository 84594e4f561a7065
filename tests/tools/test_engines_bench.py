"""The table of tools/bench/engines.py."""

from __future__ import annotations

from tools.bench.engines import table


def test_the_better_engine_and_how_far_the_other_is() -> None:
    found = {
        "update": {"megatron": 2.5, "fsdp": 2.0},
        "memory": {"megatron": 100.0, "fsdp": 125.0},
        "sync": {"megatron": 7.25, "fsdp": 14.5},
    }
    text = table({"9.8M/2": found, "55M/1": {"update": {"megatron": 0.5, "fsdp": 0.5}}})
    lines = text.splitlines()
    assert lines[0].startswith(
        "| parameters | ranks | rows | update, s: megatron | update, s: fsdp | memory, MiB: megatron"
    )
    assert lines[2] == "| 9.8M | 2 | 32 | 2.50 (1.25x) | 2.00 | 100 | 125 (1.25x) | 7.2 | 14 (2.00x) |"
    assert lines[3] == "| 55M | 1 | 8 | 0.500 | 0.500 |  |  |  |  |"
