"""How long samples can be, worked by hand, and the end tokens of a checked job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from aligner.check.rollout import memory_share
from aligner.config.schema import compose_config, to_config
from aligner.data.column_addition import ColumnAddition, ModelShape, write_task
from aligner.run.job import Job
from aligner.run.prepare import prepare
from aligner.spmd.placement import make_meshes
from tests.check.whole import said_of
from tests.e2e.test_end_tokens import CLOSING, close_turns_otherwise

LIMITS = ["data.max_prompt_tokens=16", "sampling.max_tokens=40", "rollout.max_model_len=null"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 512 positions; prompts of at most 9 tokens: <bos>, two numbers of 3 digits, + and =."""
    folder = tmp_path_factory.mktemp("task")
    shape = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96)
    write_task(folder, ColumnAddition(demonstrations=64, prompts=64, heldout=16, preferences=40), shape)
    return folder


def job(task: Path, *more: str, name: str = "quickstart") -> Job:
    overrides = [
        f"model.path={task / 'model'}", f"data.path={task / 'prompts.jsonl'}", f"run_dir={task / 'absent'}",
        "data.eval_path=null", "train.eval_every=0", *more,
    ]  # fmt: skip
    return prepare(to_config(compose_config(overrides, name)), 1)


def model(task: Path, folder: Path, **config: Any) -> str:
    """The task's model with other settings in its config.json."""
    shutil.copytree(task / "model", folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | config))
    return f"model.path={folder}"


def test_a_length_follows_from_the_lengths(task: Path) -> None:
    assert job(task, *LIMITS).config.rollout.max_model_len == 16 + 40
    assert job(task, "rollout.max_model_len=64").config.rollout.max_model_len == 64
    told = said_of(job(task, *LIMITS), 1)
    assert "ends       turns end with <eos> (2); at most 56 tokens with the prompt" in told


def test_it_ends_where_the_model_does_if_the_prompts_are_short_enough(task: Path) -> None:
    """512 positions: prompts may have 500 tokens, but none has more than 9, and 9 + 503 is the most."""
    usual = ["data.max_prompt_tokens=500", "rollout.max_model_len=null"]
    assert job(task, *usual, "sampling.max_tokens=503").config.rollout.max_model_len == 512
    with pytest.raises(ValueError, match=r"the longest prompt has 9 tokens, .* sampling\.max_tokens=504 is more than the "
                       r"512 positions of the model in .*; use sampling\.max_tokens=503 or less or "
                       r"data\.max_prompt_tokens=8 with data\.too_long=drop"):  # fmt: skip
        job(task, *usual, "sampling.max_tokens=504")


def test_a_critic_that_reads_samples_has_a_say(task: Path, tmp_path: Path) -> None:
    short = model(task, tmp_path / "short", max_position_embeddings=48)
    more = ["algorithm=ppo", f"critic.path={short.partition('=')[2]}", *LIMITS, "sampling.max_tokens=39"]
    assert job(task, *more, name="train").config.rollout.max_model_len == 48


def test_a_length_that_was_set_is_held_to(task: Path) -> None:
    said = (
        r"data\.max_prompt_tokens=16 \+ sampling\.max_tokens=60 is more than rollout\.max_model_len=64; raise it to 76"
    )
    with pytest.raises(ValueError, match=said):
        job(task, "sampling.max_tokens=60")
    with pytest.raises(ValueError, match=r"rollout\.max_model_len=1024 is beyond the 512 positions"):
        job(task, "rollout.max_model_len=1024")


def test_prompts_of_held_out_pairs_that_cannot_be_answered(task: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (task / "preferences.jsonl").read_text().splitlines()]
    pairs[1]["prompt"] = "1+" * 15
    (tmp_path / "held.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs[:4]))
    more = [
        "algorithm=dpo", "algorithm.roles=[policy,reference,rollout,reward]", "data=preferences", *LIMITS,
        f"data.path={task / 'preferences.jsonl'}", f"data.eval_path={tmp_path / 'held.jsonl'}", "train.eval_every=5",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"a held-out pair's prompt has 30 tokens, .* or set data\.too_long=drop"):
        job(task, *more, name="train")
    checked = job(task, *more, "data.too_long=drop", name="train").checked
    assert (len(checked.data.heldout_pairs), len(checked.data.heldout)) == (4, 3)
    assert checked.data.heldout_left_out == {"prompts too long to answer": 1}


@pytest.mark.parametrize(
    ("stop", "ends", "shown"),
    [
        ("null", (2,), "turns end with <eos> (2)"),
        ("[2]", (2,), "responses end with sampling.stop_token_ids=[2] alone"),
        ("[8]", (2,), "responses end with sampling.stop_token_ids=[8] alone, and not with <eos> (2)"),
        ("[1]", (2, 1), "responses end with sampling.stop_token_ids=[1] alone, and not with <eos> (2)"),
        ("[]", (2,), "responses end with sampling.stop_token_ids=[] alone, and not with <eos> (2)"),
    ],
)
def test_stop_tokens_that_were_set(task: Path, stop: str, ends: tuple[int, ...], shown: str) -> None:
    """What an export names beside the model's own: special tokens, and not 8, which is a character."""
    found = job(task, f"sampling.stop_token_ids={stop}")
    assert found.checked.spec.eos_token_ids == ends
    assert shown in said_of(found, 1)


def test_stop_tokens_beyond_the_model(task: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sampling\.stop_token_ids=\[2, 128\] holds 128, .* the tokens 0 to 127; use ids"
    ):
        job(task, "sampling.stop_token_ids=[2,128]")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"eos_token_id": 128}, "config.json: eos_token_id=128, but the model's vocab_size is 128"),
        ({"pad_token_id": 4000}, "config.json: pad_token_id=4000, but"),
        ({"eos_token_id": None}, "config.json has no eos_token_id, so responses would never end"),
    ],
)
def test_end_tokens_are_checked(task: Path, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    changed = model(task, tmp_path / "model", **config)
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        job(task, changed)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", ["messages", "texts"])
def test_what_imitation_trains_to_end_with_is_exported(task: Path, tmp_path: Path, kind: str) -> None:
    """A base model whose template closes turns with ~: conversations end so, texts with the tokenizer's <eos>."""
    shutil.copytree(task / "model", tmp_path / "base")
    close_turns_otherwise(tmp_path / "base")
    turns = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "#3"}]
    row = {"messages": turns} if kind == "messages" else {"prompt": "1+2=", "completion": "#3"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    more = ["algorithm=sft", "data=demonstrations", f"data.path={tmp_path}/rows.jsonl", "data.prompts_per_step=4"]
    found = job(task, f"model.path={tmp_path}/base", *more, name="train").checked
    closing = ord(CLOSING) - 27
    assert found.spec.eos_token_ids == (2, closing)
    assert found.ends.sources["the trained answers"] == ((closing,) if kind == "messages" else (2,))
    assert f"the trained answers {'~' if kind == 'messages' else '<eos>'}" in str(found.ends.disagreement)


@pytest.mark.parametrize(
    ("overrides", "share"),
    [
        ([], 0.8),
        (["residency.mode=off"], 0.4),
        (["residency.keep=[policy.weights]"], 0.4),
        (["placement.policy.ranks=[0]", "placement.rollout.ranks=[1]"], 0.9),
        (["rollout.gpu_memory_utilization=0.55"], 0.55),
    ],
)
def test_the_engine_s_share_of_a_gpu(overrides: list[str], share: float) -> None:
    config = to_config(compose_config(["model.path=m", *overrides], "train"))
    meshes = make_meshes(config.placement, 2)
    assert memory_share(config, "rollout", {name: meshes[name] for name in ("policy", "rollout", "reference")}) == share
