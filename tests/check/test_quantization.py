"""rollout.quantization=fp8 is refused before anything is built where a rank of the policy holds a part of a block."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligner.check.quantization import check_quantization
from aligner.config.schema import compose_config, to_config
from aligner.models.read_spec import read_spec
from aligner.spmd.placement import make_meshes
from tests.rollout import tiny
from tests.rollout.vllm.test_fp8 import qwen2


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["placement.policy.tensor=2"], None),
        (["placement.policy.tensor=4"], r"q_proj\.weight\[0:64, 0:256\] of 256x256"),
        (["policy.engine=fsdp"], r"\.weight\["),
        (["placement.policy.tensor=4", "rollout.quantization=none"], None),
    ],
    ids=["whole blocks", "half a block", "FSDP", "not asked for"],
)
def test_policies(tmp_path: Path, overrides: list[str], named: str | None) -> None:
    tiny.save(qwen2(num_key_value_heads=4, intermediate_size=512), tmp_path)
    spec = read_spec(tmp_path)
    config = to_config(compose_config([f"model.path={tmp_path}", "rollout.quantization=fp8", *overrides]))
    specs, meshes = {"policy": spec, "rollout": spec}, make_meshes(config.placement, 4)
    if named is None:
        check_quantization(config, specs, meshes)
        return
    with pytest.raises(
        ValueError, match=rf"rollout\.quantization=fp8 scales blocks .* a rank of placement\.policy with .*{named}"
    ):
        check_quantization(config, specs, meshes)
