"""Evaluation on what is held out: rewards of answers to prompts, the loss of demonstrations, preferences on pairs."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from aligner.algorithms.reference_sums import ReferenceSums
from aligner.check.job import Checked
from aligner.config.schema import Config
from aligner.objective.masked import row_sums
from aligner.objective.pairs import counted_rows
from aligner.objective.pass_at_k import pass_at_k
from aligner.reward.components import shown_component
from aligner.roles.build import Roles
from aligner.run.batches import as_demonstrations, as_pairs


class Evaluation:
    """What the roles of a job and its held-out data allow; every call is one of all ranks.

    `accuracy` is the mean reward of train.eval_samples answers (episodes) to each held-out prompt, drawn with the same seeds every time; without a
    rollout or held-out prompts, the share of held-out pairs on which the model prefers the chosen answer.
    """

    def __init__(self, roles: Roles, checked: Checked, config: Config) -> None:
        names = {role.name for role in roles.built}
        self.roles, self.config = roles, config
        self.prompts = checked.heldout if {"rollout", "reward"} <= names else []
        self.pairs = checked.data.heldout_pairs if {"policy", "reward_model"} & names else []
        self.answers = checked.data.heldout_answers if "policy" in names else []
        self._sums = ReferenceSums(roles.reference) if roles.reference else None

    @property
    def able(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.prompts or self.pairs or self.answers)

    def run(self) -> dict[str, float]:
        """accuracy, pass@k, heldout_loss, heldout_pair_accuracy and heldout_margin as far as they are known, and
        seconds_evaluate."""
        start = time.perf_counter()
        row = self._of_pairs() if self.pairs else {}
        if self.answers:
            row["heldout_loss"] = self._of_answers()
        if self.prompts:
            row |= self._of_prompts()
        elif self.pairs:
            row["accuracy"] = row["heldout_pair_accuracy"]
        return {**row, "seconds_evaluate": time.perf_counter() - start}

    def _of_prompts(self) -> dict[str, float]:
        roles, config = self.roles, self.config
        roles.policy.sync(roles.rollout)
        train, size = config.train, config.train.eval_samples
        sampling = replace(config.sampling, temperature=train.eval_temperature)
        samples = roles.rollout.sample(self.prompts, size, sampling, config.seed)
        scores = roles.reward.score(samples)
        named = shown_component(config.reward, config.train.eval_reward)
        reward_B: Tensor = (scores["components"][named] if named else scores["reward_B"]).gather()
        row = {"accuracy": reward_B.nanmean().item()}
        if size > 1:
            success_PG = torch.where(reward_B.isnan(), reward_B, (reward_B >= train.eval_success).float()).view(
                -1, size
            )
            ks = {1 << power for power in range(size.bit_length()) if 1 << power <= size} | {size}
            row |= {f"pass@{k}": pass_at_k(success_PG, k) for k in sorted(ks)}
        return row

    def _of_answers(self) -> float:
        """-log p a trained token, over all of them, in nats."""
        policy = self.roles.policy
        rows = policy.scatter(as_demonstrations(self.answers))
        sum_B: Tensor = policy.map(row_sums, policy.logprobs(rows), rows["mask_BT"]).gather()
        return -(sum_B.double().sum() / rows["mask_BT"].gather().sum()).item()

    def _of_pairs(self) -> dict[str, float]:
        """How often, and by how much, the chosen answer scores higher: by the reward model where there is one, else by
        log p - log q of the answer, or log p alone without a reference."""
        batch, names = as_pairs(self.pairs), {role.name for role in self.roles.built}
        if "reward_model" in names and "policy" not in names:
            model = self.roles.reward_model
            score_B: Tensor = model.scores(model.scatter(batch, group_size=2)).gather().double()
        else:
            policy = self.roles.policy
            rows = policy.scatter(batch, group_size=2)
            score_B = policy.map(row_sums, policy.logprobs(rows), rows["mask_BT"]).gather()
            if self._sums:
                score_B = score_B - self._sums(batch, rows).gather()
        kept_P = counted_rows(batch.mask_BT)[::2]  # as the losses do
        margin_P = (score_B[::2] - score_B[1::2])[kept_P]
        return {
            "heldout_pair_accuracy": torch.where(margin_P == 0, 0.5, (margin_P > 0).double()).mean().item(),
            "heldout_margin": margin_P.mean().item(),
        }
