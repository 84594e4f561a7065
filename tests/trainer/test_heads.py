"""Critics and reward models on Megatron against transformers: values, scores, gradients of both losses, exports."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.conftest import Ranks
from tests.trainer.test_parity import FAMILIES, each

SMALL = ("qwen3", "llama")
LAYOUTS = {1: ["adam", "micro=1000"], 2: ["adam", "tensor=2", "tensor=2,sp,adam", "pipeline=2,adam", "context=2,adam"]}
SPECIAL = {2: ["qwen3_moe:expert=2,adam", "gemma:tensor=2,sp", "llama:pipeline=2,virtual_pipeline=2"]}
EVEN = [name for name in FAMILIES if name != "three"]
"""Models whose layers make two equal stages."""
MATRIX = {
    1: [f"{name}:" for name in FAMILIES],
    2: [f"{name}:{layout}" for name in EVEN for layout in ("tensor=2,sp,recompute=full", "pipeline=2", "adam")],
    4: [
        *(f"{name}:tensor=2,pipeline=2,sp,recompute=selective" for name in EVEN),
        "qwen3_moe:tensor=2,expert=2,sp,adam",
        "qwen3_moe_raw:expert=2,pipeline=2,virtual_pipeline=2",
        "mixtral:expert=2,adam",
        "qwen3:context=2,tensor=2,sp,recompute=selective,adam",
        "llama:context=2,pipeline=2,adam",
        "qwen2:context=2,adam",
        "mixtral:context=2,expert=2,recompute=full",
        "gemma:context=4,adam",
        "one_kv:tensor=4",
        "one_kv_biased:tensor=4,sp",
    ],
}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small classification model of one label for each family."""
    from aligner.data.column_addition import write_tokenizer

    folder = tmp_path_factory.mktemp("classifiers")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or "bias" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif "proj" in key:
                    parameter.mul_(4)
                elif "embed_tokens" in key and config.model_type == "olmo2":
                    parameter.mul_(50)  # no norm before attention: of smaller ones a key would be its bias alone
                elif key.endswith(".gate.weight"):
                    parameter.mul_(20)
                elif key == "score.weight":
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return folder


STEPS = {
    size: [f"{name}:{layout}" for name in SMALL for layout in LAYOUTS[size]] + SPECIAL.get(size, []) for size in LAYOUTS
}


@pytest.mark.parametrize(("size", "case"), each(STEPS, default=1))
def test_steps_equal_those_of_transformers(
    ranks: Ranks, classifiers: Path, tmp_path: Path, size: int, case: str
) -> None:
    ranks(size).run("tests.trainer.heads_on_ranks:check_heads", classifiers, tmp_path, case)


@pytest.mark.parametrize(("size", "case"), each(MATRIX, default=0))
def test_of_every_family(ranks: Ranks, classifiers: Path, tmp_path: Path, size: int, case: str) -> None:
    ranks(size).run("tests.trainer.heads_on_ranks:check_heads", classifiers, tmp_path, case)
