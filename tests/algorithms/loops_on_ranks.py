"""What ranks do in the tests of what loops are made of: dynamic sampling, the reference's sums, evaluation on pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aligner.algorithms.reference_sums import ReferenceSums
from aligner.algorithms.sampling import scored_samples
from aligner.config.schema import compose_config, to_config
from aligner.data.prompts import Prompt
from aligner.data.samples import Feedback, Pairs, Samples, pad_rows
from aligner.reward.role import Reward
from aligner.roles.build import Roles, build_roles
from aligner.run.batches import as_feedback, as_pairs
from aligner.run.evaluate import Evaluation
from aligner.run.job import Job
from aligner.run.prepare import prepare
from aligner.spmd.mesh import Mesh
from aligner.spmd.ref import Ref
from aligner.spmd.role import Role
from aligner.spmd.world import World
from aligner.trainer.policy import Policy, Reference

Results = dict[str, Any]

SCENES: dict[str, dict[str, Any]] = {
    "no dynamic sampling": {"batches": ["11 10", "00 01"], "more": 0},
    "full at once": {"batches": ["10 01", "11 11"], "more": 2},
    "a group replaced": {"batches": ["11 10", "00 01", "22 21"], "more": 2},
    "too many found": {"batches": ["11 10", "20 02"], "more": 2},
    "the bound": {"batches": ["11 10", "00 22", "33 44", "01 01"], "more": 2},
    "none at all": {"batches": ["11 22", "33 44"], "more": 1},
    "unparsable": {"batches": ["1x 10", "2x 01"], "more": 1},
}
"""Each batch is groups of 2 responses of one letter; a digit is its own reward, x has none."""


class Table(Role):
    """Stands where the engine does: the responses to a prompt are written in its fields."""

    tokenizer: Any = None

    def generate(self, prompts: Sequence[Prompt], num_samples: int) -> Ref:
        answers = [(prompt, text) for prompt in prompts for text in prompt.fields["answers"]]
        assert len(answers) == num_samples * len(prompts)
        rows = [[*p.tokens, *self.tokenizer.encode(text, add_special_tokens=False)] for p, text in answers]
        tokens_BT, length_B = pad_rows(rows, torch.long), torch.tensor([len(row) for row in rows])
        prompt_len_B, place_T = torch.tensor([len(p.tokens) for p, _ in answers]), torch.arange(tokens_BT.shape[1])
        mask_BT = (place_T >= prompt_len_B[:, None]) & (place_T < length_B[:, None])
        index_B = torch.tensor([p.index for p, _ in answers])
        fields = [p.fields for p, _ in answers]
        return self.scatter(Samples(tokens_BT, prompt_len_B, length_B, mask_BT, index_B, fields), num_samples)

    def stream(self, prompts: Iterable[Sequence[Prompt]], num_samples: int) -> Iterator[Ref]:
        return (self.generate(batch, num_samples) for batch in prompts)


def prompts_of(batches: Sequence[str], tokenizer: Any) -> list[list[Prompt]]:
    found, count = [], 0
    for batch in batches:
        row = []
        for group in batch.split():
            tokens = tuple(tokenizer.encode("<bos>" + "1" * (count % 3 + 1), add_special_tokens=False))
            row.append(Prompt(tokens, "", {"answers": list(group), "group": count}, count))
            count += 1
        found.append(row)
    return found


def check_sampling(world: World, folder: Path, job: Job, policy: Policy) -> Results:
    results: Results = {}
    tokenizer = job.checked.tokenizer
    mesh = Mesh(tuple(range(world.size)), name="rollout")
    rollout: Any = Table("rollout", world, mesh)
    rollout.tokenizer = tokenizer
    reward = Reward("reward", world, mesh, replace(job.config.reward, rule=f"{folder / 'rule.py'}:number"), tokenizer)
    for name, scene in SCENES.items():
        stream = iter(prompts_of(scene["batches"], tokenizer))
        roles: Any = Roles({"policy": policy, "rollout": rollout, "reward": reward})
        batch = next(scored_samples(roles, stream, 2, scene["more"]))
        # a value computed from both: they line up, wherever the rows lie
        both = policy.map(
            lambda s, r: {"group": s.prompt_index_B, "reward": r}, batch.samples, batch.scores["reward_B"]
        )
        of = both.gather()
        rows = [[g, None if r != r else r] for g, r in zip(of["group"].tolist(), of["reward"].tolist(), strict=True)]
        results[f"sampling {name}"] = {"rows": rows, "report": batch.metrics, "left": len(list(stream))}
    return results


class Counting(Reference):
    """A reference that counts how often it is asked."""

    asked = 0

    def logprobs(self, samples: Ref) -> Ref:
        self.asked += 1
        return super().logprobs(samples)


def check_sums(world: World, pairs: Job, feedback: Job, policy: Policy) -> Results:
    results: Results = {}
    config = pairs.config
    mesh = pairs.checked.meshes["policy"]
    for kind, job, form in (("pairs", pairs, as_pairs), ("feedback", feedback, as_feedback)):
        reference = Counting(f"reference {kind}", world, mesh, pairs.checked.spec, config.policy)
        sums = ReferenceSums(reference)
        rows = list(job.checked.data.training[:8])
        # two epochs of three steps: the second in another order, with steps over its bounds
        second = [rows[i] for i in (7, 2, 5, 0, 1, 3, 6, 4)]
        asked, seen = [], {}
        for step in (rows[:3], rows[3:6], [*rows[6:], second[0]], second[1:4], second[4:7], [second[7], rows[7]]):
            batch: Pairs | Feedback = form(step)  # type: ignore[operator]
            ref = policy.scatter(batch, group_size=2 if kind == "pairs" else 1)
            value = policy.map(lambda v: v, sums(batch, ref)).gather()
            asked.append(reference.asked)
            for place, (index, one) in enumerate(zip(batch.prompt_index_B.tolist(), value.tolist(), strict=True)):
                seen.setdefault(f"{index} {place % 2 if kind == 'pairs' else 0}", []).append(one)
        results[f"sums {kind}"] = {"asked": asked, "seen": seen}
    return results


def check_evaluation(world: World, job: Job, demonstrations: Job, policy: Policy) -> Results:
    results: Results = {}
    row = Evaluation(Roles({"policy": policy}), demonstrations.checked, demonstrations.config).run()
    row.pop("seconds_evaluate")
    results["evaluation demonstrations"] = row
    reference = Reference("reference", world, job.checked.meshes["policy"], job.checked.spec, job.config.policy)
    wanted = {"policy": [policy], "policy and reference": [policy, reference]}
    scorer = build_roles(
        job.config, ["reward_model"], world, job.checked.meshes, job.checked.spec, job.checked.tokenizer
    )
    for name, roles in {**wanted, "reward_model": scorer.built}.items():
        evaluation = Evaluation(Roles({role.name: role for role in roles}), job.checked, job.config)
        row = evaluation.run()
        row.pop("seconds_evaluate")
        results[f"evaluation {name}"] = row
    return results


def run_loops(world: World, task: Path, layout: list[str]) -> Results:
    """What is found, by what it is about; the same on every rank. `task`: the folder of the tests' small task."""
    base = [
        f"model.path={task / 'model'}", f"run_dir={task / 'run'}", "data.max_tokens=64", "policy.micro_tokens=256",
        "data.prompts_per_step=4", f"reward_model.path={task / 'scorer'}", "train.eval_every=0", *layout,
    ]  # fmt: skip

    def job(*overrides: str) -> Job:
        return prepare(to_config(compose_config([*base, *overrides], "quickstart")), world.size)

    pairs = job("algorithm=dpo", "data=preferences", f"data.path={task / 'preferences.jsonl'}",
                f"data.eval_path={task / 'heldout_preferences.jsonl'}")  # fmt: skip
    feedback = job("algorithm=kto", "data=feedback", f"data.path={task / 'feedback.jsonl'}")
    demonstrations = job("algorithm=sft", "data=demonstrations", f"data.path={task / 'demonstrations.jsonl'}",
                         f"data.eval_path={task / 'heldout_demonstrations.jsonl'}")  # fmt: skip
    checked = pairs.checked
    policy = Policy("policy", world, checked.meshes["policy"], checked.spec, pairs.config.policy)
    return {
        **check_sampling(world, task, pairs, policy),
        **check_sums(world, pairs, feedback, policy),
        **check_evaluation(world, pairs, demonstrations, policy),
    }
