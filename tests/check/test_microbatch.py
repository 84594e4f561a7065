"""The largest microbatches of a job, by hand, and what mode=check says of their activations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from aligner.check.memory import Machine, peak_of_rank
from aligner.check.microbatch import longest_row, microbatch, step_lengths
from aligner.check.peak import remedies
from aligner.config.schema import compose_config, to_config
from aligner.data.column_addition import ModelShape, write_model
from aligner.run.job import Job
from aligner.run.prepare import prepare
from aligner.spmd.mesh import Mesh
from aligner.trainer.activations import Microbatch
from tests.check.whole import said_of
from tools.bench.workloads import answered_rows, write_rows

ONE = Mesh((0,), name="policy")
KINDS = {"demonstrations": "sft", "preferences": "dpo", "prompts": "grpo"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96), seed=0)
    return folder


def job_of(model: Path, folder: Path, kind: str, *more: str) -> Job:
    """Four rows of 40 tokens (10 of them the prompt's) and four of 20; a pair has two such answers; three rows a step."""
    pairs = kind == "preferences"
    rows = answered_rows(4, 40, natural=False, pairs=pairs) + answered_rows(4, 20, natural=False, pairs=pairs)
    if kind == "prompts":
        rows = [{"prompt": row["prompt"], "answer": "0"} for row in rows]
    write_rows(folder / "rows.jsonl", rows)
    settings = [
        f"algorithm={KINDS[kind]}", f"data={kind}", f"data.path={folder}/rows.jsonl", f"model.path={model}",
        f"run_dir={folder}/run", "data.prompts_per_step=3", "data.max_prompt_tokens=64", "sampling.max_tokens=16",
    ]  # fmt: skip
    return prepare(to_config(compose_config([*settings, "mode=check", *more])), 1)


def largest(job: Job, forward: bool = False, mesh: Mesh = ONE) -> tuple[Microbatch, int]:
    """Without the fraction that predicts, which has a test of its own."""
    batch, count = microbatch(job.config, "policy", job.checked.data, mesh, forward)
    return replace(batch, predicting=1.0), count


def test_demonstrations(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, "demonstrations")
    assert longest_row(job.config, job.checked.data) == 40
    assert step_lengths(job.config, job.checked.data, 8) == [40, 40, 40], "the longest rows may come together"
    assert largest(job) == (Microbatch(120, 40), 1)
    half = Mesh((0, 1), name="policy")
    assert half.data == 2 and largest(job, mesh=half) == (Microbatch(80, 40), 1)
    job = job_of(model, tmp_path, "demonstrations", "policy.micro_tokens=50", "policy.forward_micro_tokens=100")
    assert largest(job) == (Microbatch(50, 40), 3)
    assert largest(job, forward=True) == (Microbatch(100, 40), 2)
    job = job_of(model, tmp_path, "demonstrations", "policy.micro_tokens=7", "data.prompts_per_step=8")
    assert largest(job) == (Microbatch(40, 40), 6), "a longer row is a microbatch of its own"
    job = job_of(model, tmp_path, "demonstrations", "policy.minibatches=3")
    assert largest(job) == (Microbatch(40, 40), 1)


def test_rows_of_one_length(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, "demonstrations", "data.max_tokens=30", "data.too_long=drop")
    assert largest(job) == (Microbatch(60, 20, alike=True), 1)


def test_pairs_are_not_split(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, "preferences", "policy.micro_tokens=7")
    assert step_lengths(job.config, job.checked.data, None) == [40] * 6
    assert step_lengths(job.config, job.checked.data, 8) == [40, 31] * 3, "9 of the prompt's 10 tokens are shared"
    assert largest(job) == (Microbatch(71, 40), 3)
    assert largest(job, forward=True) == (Microbatch(40, 40), 6)


def test_responses_may_all_be_the_longest(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, "prompts", "rollout.kv_cache_mib=1", "algorithm.group_size=4")
    assert longest_row(job.config, job.checked.data) == 10 + 16
    assert largest(job) == (Microbatch(3 * (26 + 3 * 17), 26), 1), "9 tokens of each prompt are shared"


def test_an_episode_of_several_contexts_is_one_row(model: Path, tmp_path: Path) -> None:
    game, template = tmp_path / "game.py", tmp_path / "template.jinja"
    game.write_text(
        "class Game:\n    def reset(self, row, seed): return ''\n    def step(self, text): return '', 0.0, True\n"
    )
    plain = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '=' }}{% endfor %}"
    marked = plain.replace("{{ m", "{{ '+' if m.role == 'assistant' and loop.index < loop.length - 1 }}{{ m", 1)
    episodes = [
        "rollout.kv_cache_mib=1", "algorithm.group_size=2", "reward=environment", f"environment.target='{game}:Game'",
        f"data.chat_template='{template}'", "environment.max_turns=5", "rollout.max_model_len=100", "policy.share_prefix=off",
    ]  # fmt: skip
    template.write_text(plain)
    job = job_of(model, tmp_path, "prompts", *episodes)
    assert largest(job) == (Microbatch(6 * 100, 100), 1)
    batch, _ = microbatch(job.config, "policy", job.checked.data, ONE, forward=False)
    assert batch.predicting == 5 * 2 * 16 / (5 + 5 * 2 * 16), "all turns of the two may be sampled to the end"
    shared = step_lengths(job.config, job.checked.data, 4)
    assert shared == [100, 96] * 3, "4 of the shortest prompt's 5 tokens: what follows it may be any length"
    assert "several contexts" not in said_of(job, 1)
    template.write_text(marked)
    job = job_of(model, tmp_path, "prompts", *episodes, "policy.micro_tokens=256")
    batch, count = microbatch(job.config, "policy", job.checked.data, ONE, forward=False, contexts=5)
    assert (batch.tokens, batch.longest, count) == (500, 100, 6)
    note = said_of(job, 1).partition("note: with a chat template that rewrites")[2]
    assert "at most 5 (environment.max_turns) of 500 tokens together" in note and "environment.rewritten=keep" in note


@pytest.mark.parametrize(
    ("kind", "more", "fraction"),
    [
        ("demonstrations", [], 30 / 40),
        ("demonstrations", ["data.train_on=all"], 39 / 40),
        ("preferences", [], 60 / 70),
        ("prompts", ["rollout.kv_cache_mib=1", "algorithm.group_size=4"], 64 / (5 + 64)),
    ],
)
def test_tokens_that_predict(model: Path, tmp_path: Path, kind: str, more: list[str], fraction: float) -> None:
    """A prompt is a quarter of a row, and shared by a pair or a group."""
    job = job_of(model, tmp_path, kind, *more)
    batch, _ = microbatch(job.config, "policy", job.checked.data, ONE, forward=False)
    assert batch.predicting == pytest.approx(fraction)


def test_what_is_said(model: Path, tmp_path: Path) -> None:
    said = said_of(job_of(model, tmp_path, "demonstrations", "policy.micro_tokens=50"), 1)
    of_calls = r"at most: an update ([\d.]+) MiB more \(50 tokens\), a forward pass ([\d.]+) MiB more \(50 tokens\)"
    said_sizes = re.search(of_calls, said)
    assert said_sizes is not None, said
    update, forward = map(float, said_sizes.groups())
    assert 0 < forward < update
    assert "with the activations of the largest microbatch of policy" in said and "note: a rank has" not in said


def test_a_gpu_that_is_too_small_for_a_microbatch(model: Path, tmp_path: Path) -> None:
    settings = ("demonstrations", "data.prompts_per_step=8", "policy.recompute=none")
    job_of(model, tmp_path, *settings, "check.device_gib=0.02")
    with pytest.raises(
        ValueError,
        match=r"rank 0 needs up to .* largest microbatch of policy, .* Lower policy\.micro_tokens=16384, use policy\.recompute=full,",
    ):
        job_of(model, tmp_path, *settings, "check.device_gib=0.003")


def test_remedies_are_settings_of_the_role_that_needs_them(model: Path, tmp_path: Path) -> None:
    settings = ("critic.recompute=full", "critic.micro_tokens=64", "policy.forward_micro_tokens=80")
    config = job_of(model, tmp_path, "demonstrations", *settings).config
    assert remedies(config, "critic", True).startswith("Lower critic.micro_tokens=64, raise placement.critic.tensor,")
    assert "policy.micro_tokens=16384 and policy.forward_micro_tokens=80, use" in remedies(config, "policy", True)
    forward_only = remedies(config, "policy", False)
    assert forward_only.startswith("Lower policy.forward_micro_tokens=80, or raise") and "recompute" not in forward_only


def test_the_fullest_rank_by_hand(model: Path, tmp_path: Path) -> None:
    held, taken = {"policy": 10.0, "reference": 5.0, "rollout": 20.0}, {"policy": 8.0, "reference": 2.0}
    cpu, gpu = Machine(1, 100, None), Machine(1, 100, 100.0)
    stays = job_of(model, tmp_path, "demonstrations", "residency.mode=off").config
    moves = job_of(model, tmp_path, "demonstrations", "residency.keep=[policy]").config
    of_policy = (43.0, "policy")
    assert peak_of_rank(stays, held, taken, list(held), gpu) == of_policy
    assert peak_of_rank(moves, held, taken, list(held), cpu) == of_policy
    assert peak_of_rank(moves, held, taken, list(held), gpu) == (30.0, "rollout"), (
        "the policy's 10 beside the engine's 20"
    )
