"""Every field of every family's config.json, mutated: refused by name, or trained, transformers' and vLLM's models are one.

`pytest -m slow tests/models/test_config_fuzz.py -s` runs all of them and prints the table of docs/measured.md; a sixteenth is
run by default.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

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


def run(torchrun: Any, folder: Path, which: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("fuzz_rank.py")
    done = torchrun(1, [str(script), str(folder), which, *FAMILIES], seconds=400 if which == "sample" else 6000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    faults = [one for one in found if one["outcome"] not in ("refused", "equal")]
    assert not faults, "\n".join(map(str, faults[:20]))
    return found


def test_a_sample_of_mutations(torchrun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = run(torchrun, tmp_path, "sample")
    for family in FAMILIES:
        counts = Counter(one["outcome"] for one in found if one["family"] == family)
        assert counts["refused"] > 10 and counts["equal"] > 5, (family, counts)


@pytest.mark.slow
@pytest.mark.timeout(6100)
def test_every_mutation(torchrun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = run(torchrun, tmp_path, "all")
    print(
        "\n| family | fields | mutations | refused | equal | logits off by at most |\n| --- | --- | --- | --- | --- | --- |"
    )
    for family in FAMILIES:
        mine = [one for one in found if one["family"] == family]
        counts = Counter(one["outcome"] for one in mine)
        fields = {key for one in mine for key in one["change"]}
        assert fields.issuperset(fields_of(family))
        equal = [one for one in mine if one["outcome"] == "equal"]
        for change in (*IMPLEMENTED, *OF_ONE.get(family, ())):
            assert change in [one["change"] for one in equal], (family, change)
        worst = max(float(one["why"]) for one in equal)
        print(
            f"| {family} | {len(fields)}, {len(fields_of(family))} of its class | {len(mine)} | {counts['refused']} | "
            f"{counts['equal']} | {worst:.0e} |"
        )
