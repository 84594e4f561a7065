"""A model class in the folder's own Python files: refused unless trusted; then trained, exported and generated from as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.models.tensors import logical_tensors
from aligner.rollout.config import Sampling
from aligner.rollout.transformers.engine import TransformersEngine
from aligner.trainer.fsdp.model import check_model
from tests.conftest import Ranks
from tests.models.own_code import CONFIG, EXPERTS, SCALAR, save_model
from tests.rollout import tiny


def test_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    with pytest.raises(ValueError, match=r"auto_map=.* run only with model\.trust_remote_code=true"):
        read_spec(tmp_path)
    spec = read_spec(tmp_path, True)
    assert spec.trust_remote_code and spec.family == "damped" and spec.tensors is not None
    assert logical_tensors(spec) == {name: tuple(tensor.shape) for name, tensor in tiny.tensors(model).items()}
    with pytest.raises(ValueError, match=r"auto_map names no AutoModelForSequenceClassification"):
        check_model(with_scalar_head(spec))


@pytest.mark.parametrize(
    ("auto", "named", "message"),
    [
        ("AutoConfig", "other/repository--file.Config", r"auto_map\.AutoConfig=.* put the file into the folder"),
        ("AutoModelForCausalLM", "other/repository--modeling_damped.DampedForCausalLM", "put the file into the folder"),
        ("AutoModelForCausalLM", "modeling_damped.Nothing", "modeling_damped.Nothing cannot be loaded: AttributeError"),
        ("AutoModelForCausalLM", "nowhere.DampedForCausalLM", "nowhere.DampedForCausalLM cannot be loaded: OSError"),
    ],
)
def test_a_class_that_is_not_there_is_named(auto: str, named: str, message: str, tmp_path: Path) -> None:
    save_model(tmp_path)
    auto_map = {**CONFIG["auto_map"], auto: named}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    with pytest.raises(ValueError, match=message):
        read_spec(tmp_path, True)


def test_trains_as_transformers_does_and_its_export_has_the_code(ranks: Ranks, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    more = (1, None, True)
    (worst,) = ranks(1).run("tests.trainer.fsdp.parity_on_ranks:check", tmp_path / "model", tmp_path, *more)
    assert worst["logprobs"] < 1e-5 and worst["gradients"] < 1e-4, worst
    export = tmp_path / "export"
    for name in ("configuration_damped.py", "modeling_damped.py"):
        assert (export / name).read_text() == (tmp_path / "model" / name).read_text()
    again = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert type(again).__name__ == "DampedForCausalLM" and again.config.damping == 0.4


@pytest.mark.parametrize("more", [{}, {"micro_tokens": 200}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("kind", ["experts", "scalar"])
def test_trains_on_two_ranks(ranks: Ranks, tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """Experts that one rank's tokens alone chose have a gradient; a parameter without dimensions is not cut."""
    folder = tmp_path / kind  # transformers keeps a folder's code by the folder's name
    save_model(folder, modeling={"experts": EXPERTS, "scalar": SCALAR}[kind])
    for worst in ranks(2).run("tests.trainer.fsdp.parity_on_ranks:check", folder, tmp_path, 1, more, True):
        rounded = 0.5 if "dtype" in more else 0.0  # a router's choice may turn with rounding
        assert worst["logprobs"] < max(1e-5, rounded) and (rounded or worst["gradients"] < 1e-4), worst


def test_generates_as_transformers_does(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    engine = TransformersEngine(read_spec(tmp_path, True), tiny.config("transformers"), torch.device("cpu"))
    tiny.write(engine.weights, model)
    asked = tiny.prompts(4)
    sampling = Sampling(temperature=0.0, max_tokens=16, stop_token_ids=())
    for prompt, (one,) in zip(asked, engine.generate(asked, [0] * 4, sampling), strict=True):
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert one.tokens == tokens[0, len(prompt) :].tolist()
        assert tiny.gap(model, prompt, one) < 1e-5


ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_trains_and_generates_it(torchrun: Callable[..., Any], tmp_path: Path, engine: str) -> None:
    """Its own log says how far the engine's log-probabilities are from the policy's: the same class, with the same weights."""
    shape = ModelShape(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(tmp_path / "task", ColumnAddition(demonstrations=8, prompts=8, heldout=8, preferences=8), shape)
    save_model(tmp_path / "own", tmp_path / "task/model")
    overrides = [
        f"model.path={tmp_path / 'own'}", f"data.path={tmp_path / 'task/prompts.jsonl'}", f"run_dir={tmp_path / 'run'}",
        "data.eval_path=null", "train.eval_every=0", "train.steps=2", "data.prompts_per_step=4", "algorithm.group_size=2",
        "sampling.max_tokens=8", "policy.engine=fsdp", f"rollout.engine={engine}", "rollout.kv_cache_mib=16",
    ]  # fmt: skip
    command = ["-m", "aligner.main", "--config-name=quickstart", *overrides, "model.trust_remote_code=true"]
    done = torchrun(1, command, seconds=200)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "grad_norm" in row]
    assert len(steps) == 2 and all(row["gap"] < 1e-5 for row in steps), steps
    export = tmp_path / "run/model"
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    assert type(model).__name__ == "DampedForCausalLM" and model.config.damping == 0.4
