"""Every method of conf/algorithm as a short job of the tests' small task."""

from __future__ import annotations

from pathlib import Path

from aligner.config.schema import CONF
from tests.pool import Pool

Row = dict[str, float]
Found = dict[str, list[Row]]
"""layout -> a row for each step."""

ENTROPY = "+algorithm.loss.entropy_coef=0.05"
"""Keeps a loss away from 0, where advantages cancel and a relative error says nothing."""
SMALL = ["data.prompts_per_step=4", "algorithm.group_size=4"]
TWICE = ["policy.minibatches=2", "policy.epochs=2"]
ONLINE: dict[str, list[str]] = {
    "grpo": [*SMALL, ENTROPY.lstrip("+"), "algorithm.loss.kl_coef=0.05"],
    "dapo": [
        *SMALL,
        ENTROPY.lstrip("+"),
        "reward.rule='{task}/rule.py:brief'",
        "algorithm.length_penalty.buffer=8",
        "algorithm.more_batches=8",
    ],
    "dr_grpo": [*SMALL, ENTROPY.lstrip("+")],
    "grpo_decoupled": [*SMALL, ENTROPY.lstrip("+"), "stream.lag=0", "stream.step_tokens=8"],
    "gspo": [*SMALL, ENTROPY],
    "rloo": [*SMALL, "algorithm.reward_kl_coef=0.1"],
    "reinforce_pp_baseline": [*SMALL, ENTROPY.lstrip("+"), "algorithm.loss.kl_coef=0.05"],
    "reinforce_pp": [ENTROPY],
    "remax": ["algorithm.reward_kl_coef=0.1"],
    "ppo": ["algorithm.kl_control.initial=0.1", ENTROPY],
    "grpo_turns": [*SMALL, ENTROPY.lstrip("+"), "algorithm.loss.kl_coef=0.05"],
    "ppo_turns": ["algorithm.kl_control.initial=0.1", ENTROPY],
    "online_dpo": [],
}
OFFLINE: dict[str, list[str]] = {
    "sft": ["data=demonstrations", "data.path={task}/demonstrations.jsonl"],
    "kto": ["data=feedback", "data.path={task}/feedback.jsonl"],
    **{
        name: ["data=preferences", "data.path={task}/preferences.jsonl"]
        for name in ("dpo", "ipo", "robust_dpo", "orpo", "simpo", "reward_model")
    },
}
UNTRAINED = {"rank_samples": ["algorithm=rank_samples", *SMALL, "algorithm.out={task}/ranked.jsonl"]}
PAPERS: dict[str, list[str]] = {
    "grpo_paper": [*SMALL, ENTROPY.lstrip("+")],
    "dapo_paper": ["data.prompts_per_step=16", "algorithm.group_size=2", "algorithm.length_penalty.buffer=8"],
    "rloo_paper": SMALL,
    "reinforce_pp_paper": [ENTROPY],
    "ppo_paper": [],
    "ipo_paper": ["data=preferences", "data.path={task}/preferences.jsonl"],
}
"""Published settings of methods above: their equations are in test_papers.py, here they only run."""
MORE: dict[str, list[str]] = {
    "grpo, several steps a batch": ["algorithm=grpo", *ONLINE["grpo"], *TWICE, "policy.micro_tokens=64"],
    "grpo_decoupled, ahead, several steps a batch": [
        "algorithm=grpo_decoupled",
        *ONLINE["grpo"],
        *TWICE,
        "policy.micro_tokens=64",
        "algorithm.loss.weight_high=1.01",
    ],
    "ppo, several steps a batch": [
        "algorithm=ppo",
        *ONLINE["ppo"],
        *TWICE,
        "critic.minibatches=2",
        "critic.epochs=2",
        "critic.micro_tokens=64",
        "policy.micro_tokens=64",
        "algorithm.scale_rewards=true",
        "algorithm.kl_control._target_=aligner.objective.kl_control.AdaptiveKL",
        "+algorithm.kl_control.target=2",
    ],
    "dpo, several steps a batch": ["algorithm=dpo", *OFFLINE["dpo"], *TWICE, "policy.micro_tokens=64"],
}
BASE = [
    "model.path={task}/model",
    "data.path={task}/prompts.jsonl",
    "reward.rule='{task}/rule.py:digits'",
    "reward.workers=1",
    "run_dir={task}/run",
    "train.eval_every=0",
    "data.prompts_per_step=8",
    "data.max_tokens=64",
    "sampling.max_tokens=20",
    "rollout.kv_cache_mib=16",
    "policy.micro_tokens=256",
    "policy.optimizer.warmup_steps=0",
    "policy.optimizer.lr=1e-4",
    "critic.optimizer.lr=1e-4",
    "reward_model.optimizer.lr=1e-4",
]


def methods() -> list[str]:
    """What conf/algorithm has."""
    return sorted(file.stem for file in (CONF / "algorithm").glob("*.yaml"))


def cases() -> dict[str, list[str]]:
    """Case -> overrides: every method that trains, and some of them with several optimizer steps on a batch."""
    return {name: [f"algorithm={name}", *more] for name, more in (ONLINE | OFFLINE).items()} | MORE


def run_method(
    pool: Pool, task: Path, case: list[str], layouts: dict[str, list[str]], seconds: float = 280, steps: int = 3
) -> Found:
    """A case (its overrides) under every layout, on the pool's ranks."""
    base, case = ([text.format(task=task) for text in texts] for texts in (BASE, [*case, f"train.steps={steps}"]))
    found: Found = pool.run("tests.algorithms.methods_on_ranks:run_case", base, case, layouts, steps, seconds=seconds)[
        0
    ]
    return found
