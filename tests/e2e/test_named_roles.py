"""Models beside the usual ones: two reward models, two policies, a judge; the same numbers under any placement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from aligner.data.column_addition import write_tokenizer
from tests.e2e.test_own_loop import EXAMPLES
from tests.rollout.tiny import greedy

Rows = list[dict[str, Any]]
Job = Callable[..., Rows]
NEAR = 1e-5
"""Relative difference between two placements, in fp32."""
LOSS = ("algorithm.loss.kl_coef=0.05", "algorithm.loss.entropy_coef=0.05", "policy.optimizer.lr=1e-4", "train.steps=3")


@pytest.fixture(scope="module")
def models(task: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two reward models and a second language model of the task's tokenizer."""
    root: Path = tmp_path_factory.mktemp("named")
    config = AutoConfig.from_pretrained(task.folder / "model", num_labels=1)
    made: dict[str, Any] = {}
    for seed, name in enumerate(("helpful", "safe"), start=1):
        torch.manual_seed(seed)
        made[name] = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in made[name].parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            made[name].score.weight.mul_(20)
    made["peer"] = AutoModelForCausalLM.from_pretrained(task.folder / "model")
    with torch.no_grad():
        for parameter in made["peer"].parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for name, model in made.items():
        model.save_pretrained(root / name)
        write_tokenizer(root / name)
    return {name: root / name for name in made}


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """own(name, ranks, *overrides): metrics of a job whose loop is a copy of the example `name`."""

    def run(name: str, ranks: int, *overrides: str) -> Rows:
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path / "my_loop.py")
        return job(ranks, f"algorithm._target_=my_loop.{name}", *overrides, seconds=400)

    return run


def same(rows: Rows, wanted: Rows, names: tuple[str, ...]) -> None:
    assert len(rows) == len(wanted) == 3
    for row, want in zip(rows, wanted, strict=True):
        assert row["length"] == want["length"], "other samples"
        for name in names:
            assert row[name] == pytest.approx(want[name], rel=NEAR), (name, row["step"])


def test_two_reward_models_on_ranks_of_their_own(own: Job, job: Job, task: Any, models: dict[str, Path]) -> None:
    given = [f"models.{name}={{kind: reward_model, path: {models[name]}}}" for name in ("helpful", "safe")]
    roles = "algorithm.roles=[policy,rollout,helpful,safe]"
    loss = [setting for setting in LOSS if "kl_coef" not in setting]
    together = own("two_reward_models", 1, roles, *given, *loss)
    ranks = {"policy": 0, "rollout": 0, "helpful": 1, "safe": 2}
    apart = [f"placement.{name}.ranks=[{rank}]" for name, rank in ranks.items()]
    split = own("two_reward_models", 3, roles, *given, *loss, *apart)
    same(split, together, ("reward", "loss", "grad_norm"))
    listed = "algorithm.roles=[policy,rollout,reward]"  # the reward's components name the rest
    rows = job(
        3, "reward=two_models", *given, listed, *loss, *apart, "placement.reward.ranks=[2]",
        "reward.rule=''",
    )  # fmt: skip
    same(rows, together, ("reward",))
    assert all(row["reward/helpful"] != row["reward/safe"] for row in rows)


def two_policies(peer: Path) -> list[str]:
    return [
        "algorithm.roles=[policy,rollout,peer,peer_rollout,reward]",
        f"models.peer={{kind: policy, path: {peer}, micro_tokens: 256, optimizer: {{lr: 3e-4}}}}",
        f"models.peer_rollout={{kind: engine, path: {peer}, kv_cache_mib: 16, max_model_len: 64}}",
        *LOSS,
    ]


APART = [
    f"placement.{name}.ranks=[{rank}]"
    for name, rank in {"policy": 0, "rollout": 0, "peer": 1, "peer_rollout": 1}.items()
]


def test_two_policies_train_in_one_loop(own: Job, models: dict[str, Path], tmp_path: Path) -> None:
    peer = models["peer"]
    together = own("two_policies", 2, *two_policies(peer), "train.save=true")
    split = own("two_policies", 2, *two_policies(peer), *APART, "train.save=true")
    same(split, together, ("reward", "loss", "grad_norm", "peer_loss", "peer_grad_norm"))
    assert all(row["peer_gap_max"] < 1e-4 and row["gap_max"] < 1e-4 for row in split), (
        "each engine has its policy's weights"
    )
    assert together[-1]["peer_lr"] == pytest.approx(3e-4) and together[-1]["lr"] == pytest.approx(1e-4)
    for run in ("run0", "run1"):  # exported beside the policy, as it is after 3 updates
        trained, start = (AutoModelForCausalLM.from_pretrained(at) for at in (tmp_path / run / "peer", peer))
        moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
        assert 1e-5 < max(moved) < 3 * 3e-4 * 3
        assert (tmp_path / run / "model" / "config.json").is_file()


@pytest.mark.matrix
def test_two_policies_go_on_from_a_checkpoint_in_another_placement(
    own: Job, models: dict[str, Path], tmp_path: Path
) -> None:
    whole = own("two_policies", 2, *two_policies(models["peer"]), "checkpoint.every=2")
    step = Path("checkpoints") / "step-00000002"
    shutil.copytree(tmp_path / "run0" / step, tmp_path / "run1" / step)
    assert (tmp_path / "run0" / step / "peer" / "config.json").is_file(), "a model to start from, of each that learns"
    (row,) = own("two_policies", 2, *two_policies(models["peer"]), *APART, "checkpoint.every=2")
    same([*whole[:2], row], whole, ("reward", "loss", "grad_norm", "peer_loss", "peer_grad_norm", "peer_lr"))


JUDGED = """
import json
from aligner.algorithms import Step
from aligner.objective.advantages import group_advantages
from aligner.rollout.config import Sampling


def judged(roles, prompts, cfg):
    policy, rollout, judge, teacher = roles.policy, roles.rollout, roles["judge"], roles["teacher"]
    assert "judge" in roles and "critic" not in roles
    assert judge.tokenizer.get_vocab() == roles.reward.tokenizer.get_vocab()
    greedy = Sampling(temperature=0.0, max_tokens=6, stop_token_ids=())
    policy.reshard_to(rollout)
    for batch in prompts:
        samples = rollout.generate(batch, num_samples=cfg.group_size)
        scores = roles.reward.score(samples)
        answers = judge.generate(batch, sampling=greedy).gather()  # its folder's weights, which left for others' memory
        gap = (teacher.logprobs(samples).gather() - roles.reference.logprobs(samples).gather()).abs().max()
        if policy.world.rank == 0:
            with open(f"{cfg.out}", "a") as file:
                rows = [answers.tokens_BT[i, : n].tolist() for i, n in enumerate(answers.length_B.tolist())]
                print(json.dumps([rows, answers.prompt_len_B.tolist()]), file=file)
        advantage_B = policy.map(group_advantages, scores["reward_B"], group_size=cfg.group_size)
        metrics = policy.update(cfg.loss, samples, advantage_B=advantage_B)
        policy.reshard_to(rollout)
        yield Step(metrics, samples, scores, {"teacher_gap": float(gap)})
"""


@pytest.mark.matrix
@pytest.mark.parametrize(
    "placed", [[], ["placement.judge.ranks=[1]", "placement.teacher.ranks=[1]"]], ids=["shared", "own"]
)
def test_a_judge_and_a_teacher_have_the_weights_of_their_folders(
    job: Job, models: dict[str, Path], task: Any, tmp_path: Path, placed: list[str]
) -> None:
    (tmp_path / "my_loop.py").write_text(JUDGED)
    rows = job(
        2, "algorithm._target_=my_loop.judged", f"+algorithm.out={tmp_path / 'judged'}", "train.steps=2",
        "algorithm.roles=[policy,rollout,reference,reward,judge,teacher]", "residency.mode=offload",
        f"models.judge={{kind: engine, path: {models['peer']}, kv_cache_mib: 16, max_model_len: 64}}",
        f"models.teacher={{kind: frozen, path: {task.folder / 'model'}}}", *placed, seconds=400,
    )  # fmt: skip
    assert all(row["teacher_gap"] < 1e-5 for row in rows), "the same folder as the reference's"
    judge = AutoModelForCausalLM.from_pretrained(models["peer"], dtype=torch.float32).eval()
    steps = [json.loads(line) for line in (tmp_path / "judged").read_text().splitlines()]
    assert len(steps) == 2
    for answers, lengths in steps:
        for tokens, length in list(zip(answers, lengths, strict=True))[:4]:
            assert tokens[length:] == greedy(judge, tokens[:length], len(tokens) - length)
