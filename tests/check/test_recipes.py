"""The recipes for GPUs fit the machines that they name: mode=check with the sizes of published models, whose weights are holes."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from aligner.config.schema import CONF, compose_config, to_config
from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from aligner.models.read_spec import read_spec
from aligner.models.tensors import logical_tensors
from aligner.run.prepare import prepare
from tests.check.whole import said_of

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
QWEN2_5_7B = COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_sliding_window": False,
}  # fmt: skip
QWEN3_30B_A3B = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
RECIPES: dict[str, tuple[dict[str, Any], int, float]] = {
    "grpo_7b_8gpu": (QWEN2_5_7B, 8, 7.6e9),
    "grpo_30b_a3b_16gpu": (QWEN3_30B_A3B, 16, 30.5e9),
}
"""Name -> (config.json, GPUs, parameters)."""


SHARD = 1 << 30
"""Bytes of one file, at most: files are mapped into memory as they are looked at."""


def write_holes(folder: Path, config: dict[str, Any], tokenizer: Path) -> None:
    """A checkpoint of these sizes in bfloat16, whose file takes no room on disk."""
    folder.mkdir()
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    ends = json.loads((tokenizer / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends["eos_token_id"]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends["eos_token_id"]}))
    shards: list[dict[str, tuple[list[int], int]]] = [{}]
    for name, shape in logical_tensors(read_spec(str(folder))).items():
        size = 2 * math.prod(shape)
        if sum(end for _, end in shards[-1].values()) + size > SHARD:
            shards.append({})
        shards[-1][name] = list(shape), size
    files = {f"model-{number:05d}.safetensors": shard for number, shard in enumerate(shards)}
    for file_name, shard in files.items():
        header, end = {}, 0
        for name, (shape, size) in shard.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    index = {name: file_name for file_name, shard in files.items() for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    usage = namedtuple("usage", "total used free")(1 << 44, 0, 1 << 44)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    published, ranks, parameters = RECIPES[name]
    write_task(tmp_path / "task", ColumnAddition(demonstrations=8, prompts=160, heldout=8, preferences=4), ModelShape())
    write_holes(tmp_path / "model", published, tmp_path / "task" / "model")
    rows = [{"problem": f"{n} + {n}", "solution": f"\\boxed{{{2 * n}}}"} for n in range(160)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        f"model.path={tmp_path}/model", f"data.path={tmp_path}/rows.jsonl", f"run_dir={tmp_path}/run", "mode=check",
        f"check.ranks={ranks}", "check.ranks_per_host=8", "check.device_gib=80", "data.chat_template=null",
    ]  # fmt: skip
    job = prepare(to_config(compose_config(settings, name)), ranks)
    text = said_of(job, ranks)
    print(text)
    assert (job.config.policy.dtype, job.config.policy.recompute, job.config.policy.experts) == (
        "bfloat16",
        "full",
        "grouped",
    )
    assert job.config.rollout.gpu_memory_utilization == 0.8
    count = float(text.split("B parameters")[0].split()[-1]) * 1e9
    assert count == pytest.approx(parameters, rel=0.01)
    assert (
        f"the job can start on {ranks} ranks" in text
        and "at most 64.00 GiB on rank 0 while rollout computes" in text
        and "at most: an update" in text
    )
    assert "note: a rank has" not in text
    with pytest.raises(ValueError, match=r"rank 0 needs (at least|up to) .* GiB"):
        prepare(to_config(compose_config([*settings, "check.device_gib=24"], name)), ranks)


def test_every_recipe_is_checked() -> None:
    assert {file.stem for file in CONF.glob("*gpu.yaml")} == set(RECIPES)
