"""Every field of every family's config.json, mutated: refused by name, or trained, transformers' and vLLM's models are one.

`pytest -m slow tests/models/test_config_fuzz.py -s` runs all of them and prints the table of docs/measured.md; a sixteenth is
run by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.models.mutations import ABSENT, FAMILIES, LLAMA3, LONG, YARN, fields_of

IMPLEMENTED: list[dict[str, Any]] = [{"rms_norm_eps": 2.0}, {"architectures": None}]
"""What must not be refused: nobody is served by a reader that refuses everything."""
SCALED: list[dict[str, Any]] = [
    {"rope_scaling": {**LLAMA3, "type": "llama3"}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}},
    {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 3}},
    {"rope_scaling": LONG},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
]
"""Of families whose layers all have one kind of rotary positions, of any kind; Mixtral's need a head_dim for some."""
OF_ONE: dict[str, list[dict[str, Any]]] = {
    "llama": [{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}],
    "qwen3_moe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 3}],
    "mixtral": [{"num_experts_per_tok": 3}, *SCALED[:2]],
    "gemma": [{"hidden_act": "gelu", "hidden_activation": None}],
    "phi3": [
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rope_scaling": LONG, "original_max_position_embeddings": 50},
    ],
    "gemma3_text": [
        {"layer_types": ABSENT, "sliding_window_pattern": 2},
        {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 500.0},
                "sliding_attention": {"rope_theta": 100.0},
            }
        },
        {
            "rope_parameters": ABSENT,
            "rope_theta": 500.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ],
}
OF_ONE |= {
    name: [*OF_ONE.get(name, []), *SCALED] for name in FAMILIES if name not in ("mixtral", "phi3", "gemma3_text")
}


SAMPLED = 16
"""Every so many of the mutations are the sample."""
Rows = list[dict[str, Any]]


def run(ranks: Ranks, folder: Path, family: str, start: int, step: int, seconds: float) -> Rows:
    (rows,) = ranks(1).run("tests.models.fuzz_on_ranks:outcomes", folder, family, start, step, seconds=seconds)
    faults = [row for row in rows if row["outcome"] not in ("refused", "equal")]
    assert not faults, "\n".join(map(str, faults[:20]))
    return rows  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_of_mutations(ranks: Ranks, tmp_path: Path, family: str) -> None:
    rows = run(ranks, tmp_path, family, list(FAMILIES).index(family), SAMPLED, 300)
    counts = Counter(row["outcome"] for row in rows)
    assert counts["refused"] > 10 and counts["equal"] > 5, counts


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Its rows are printed when all are there."""
    rows: list[str] = []
    yield rows
    print("\n\n| family | fields | mutations | refused | equal | logits off by at most |\n" + "| --- " * 6 + "|")
    print("\n".join(rows))


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mutation(ranks: Ranks, tmp_path: Path, table: list[str], family: str) -> None:
    rows = run(ranks, tmp_path, family, list(FAMILIES).index(family), 1, 1200)
    counts = Counter(row["outcome"] for row in rows)
    fields = {key for row in rows for key in row["change"]}
    assert fields.issuperset(fields_of(family))
    equal = [row for row in rows if row["outcome"] == "equal"]
    for change in (*IMPLEMENTED, *OF_ONE.get(family, ())):
        assert change in [row["change"] for row in equal], change
    worst = max(float(row["why"]) for row in equal)
    table.append(
        f"| {family} | {len(fields)}, {len(fields_of(family))} of its class | {len(rows)} | {counts['refused']} | "
        f"{counts['equal']} | {worst:.0e} |"
    )
