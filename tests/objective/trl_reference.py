"""TRL's own losses and advantages on tensors: its methods are called as they are, on an object that has what they read.

Nothing of TRL's arithmetic is written down here. What a method would get from a model (log-probabilities, logits,
scores, rewards) it is handed; what it would gather from other processes is what it gave.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Trl:
    """TRL's trainers by name, and how to call them. B rows: for pairs, the chosen and the rejected in turn."""

    def __init__(self) -> None:
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        from trl.rewards import get_soft_overlong_punishment
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
        from trl.trainer.reward_trainer import RewardTrainer
        from trl.trainer.rloo_trainer import RLOOTrainer

        self.CPO, self.ORPO, self.DPO, self.KTO = CPOTrainer, ORPOTrainer, DPOTrainer, KTOTrainer
        self.GRPO, self.RLOO, self.Reward = GRPOTrainer, RLOOTrainer, RewardTrainer
        self.get_soft_overlong_punishment = get_soft_overlong_punishment

    def dpo(
        self, logp_BT: Tensor, mask_BT: Tensor, reference_sum_B: Tensor, **settings: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """`DPOTrainer._compute_loss`: the mean over pairs, and the metrics."""
        trainer = trainer_with(
            **{"loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0, **settings},
            ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        )  # fmt: skip
        mask = chosen_first(mask_BT)
        reference_chosen, reference_rejected = chosen_first(reference_sum_B).chunk(2)
        batch = {
            "input_ids": torch.zeros_like(mask, dtype=torch.long),
            "attention_mask": torch.ones_like(mask, dtype=torch.long),
            "completion_mask": mask.long(),
            "ref_chosen_logps": reference_chosen,
            "ref_rejected_logps": reference_rejected,
        }
        outputs = iter([of_tokens(chosen_first(logp_BT), mask)])
        loss = self.DPO._compute_loss(trainer, answering(outputs), batch, False)
        return loss, last(trainer)

    def kto(
        self, logp_BT: Tensor, mask_BT: Tensor, reference_sum_B: Tensor, label_B: Tensor,
        other_logp_BT: Tensor, other_reference_sum_B: Tensor, **settings: Any,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """`KTOTrainer._compute_loss`, where `other_` are the responses to other prompts, of the same mask."""
        trainer = trainer_with(loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **settings)
        trainer._compute_kl_logps = MethodType(self.KTO._compute_kl_logps, trainer)
        ids_BT = torch.zeros_like(mask_BT, dtype=torch.long)
        batch = {
            "input_ids": ids_BT, "attention_mask": ids_BT + 1, "completion_mask": mask_BT.long(),
            "KL_input_ids": ids_BT, "KL_attention_mask": ids_BT + 1, "KL_completion_mask": mask_BT.long(),
            "label": label_B, "ref_logps": reference_sum_B, "ref_KL_logps": other_reference_sum_B,
        }  # fmt: skip
        outputs = iter([of_tokens(other_logp_BT, mask_BT), of_tokens(logp_BT, mask_BT)])
        return self.KTO._compute_loss(trainer, answering(outputs), batch, False), last(trainer)

    def cpo(self, chosen_P: Tensor, rejected_P: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`CPOTrainer.cpo_loss`: losses and rewards, a pair each."""
        trainer = trainer_with(**{"alpha": 0.0, "label_smoothing": 0.0, **settings})
        return self.CPO.cpo_loss(trainer, chosen_P, rejected_P)

    def orpo(
        self, logits_BTV: Tensor, tokens_BT: Tensor, mask_BT: Tensor, beta: float
    ) -> tuple[Tensor, dict[str, float]]:
        """`ORPOTrainer.get_batch_loss_metrics` from the logits on, without a prompt."""
        trainer = trainer_with(is_encoder_decoder=False, padding_value=0, beta=beta)
        for name in ("concatenated_inputs", "get_batch_logps"):
            setattr(trainer, name, getattr(self.ORPO, name))
        for name in ("concatenated_forward", "odds_ratio_loss"):
            setattr(trainer, name, MethodType(getattr(self.ORPO, name), trainer))
        batch = {}
        for side, tokens, mask in zip(
            ("chosen", "rejected"), chosen_first(tokens_BT).chunk(2), chosen_first(mask_BT).chunk(2), strict=True
        ):
            # Token 0 is the state before the first one; it is seen and not learned.
            seen = mask.long().index_fill(1, torch.tensor([0]), 1)
            batch |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": seen}
            batch[f"{side}_labels"] = tokens.masked_fill(~mask, -100)
        logits = chosen_first(logits_BTV)
        return self.ORPO.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)

    def reward_model(
        self, score_B: Tensor, margin_P: Tensor | None, centre_coef: float | None
    ) -> tuple[Tensor, dict[str, float]]:
        """`RewardTrainer.compute_loss`: the mean over pairs."""
        trainer = trainer_with(args=SimpleNamespace(center_rewards_coefficient=centre_coef))
        inputs = {"attention_mask": torch.ones(len(score_B), 1)} | ({} if margin_P is None else {"margin": margin_P})
        outputs = iter([SimpleNamespace(logits=chosen_first(score_B)[:, None])])
        return self.Reward.compute_loss(trainer, answering(outputs), inputs), last(trainer)

    def grpo(
        self, logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor, advantage: Tensor,
        reference_logp_BT: Tensor | None, **settings: Any,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """`GRPOTrainer._compute_loss`: reduced as `loss_type` says. `weight_BT`: of vLLM's samples."""
        weight_BT = settings.pop("weight_BT", None)
        args = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False)
        trainer = trainer_with(
            **{"importance_sampling_level": "token", "beta": 0.0, **settings}, args=args, top_entropy_quantile=1.0,
            off_policy_mask_threshold=None, use_vllm=weight_BT is not None,
            vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
        )  # fmt: skip
        return self.GRPO._compute_loss(
            policy_of(trainer, logp_BT),
            None,
            {
                **responses(mask_BT),
                "advantages": advantage,
                "old_per_token_logps": rollout_logp_BT,
                "ref_per_token_logps": reference_logp_BT,
                "importance_sampling_ratio": weight_BT,
            },
        ), last(trainer)

    def rloo(self, logp_BT: Tensor, old_logp_B: Tensor, mask_BT: Tensor, advantage_B: Tensor, clip: float) -> Tensor:
        """`RLOOTrainer._compute_loss`: the mean over rows."""
        trainer = policy_of(trainer_with(epsilon_low=clip, epsilon_high=clip), logp_BT)
        inputs = {**responses(mask_BT), "advantages": advantage_B, "old_logps": old_logp_B}
        return self.RLOO._compute_loss(trainer, None, inputs)

    def advantages(
        self, kind: str, reward_B: Tensor, group_size: int, *, lengths: list[int] | None = None,
        logp_BT: Tensor | None = None, reference_logp_BT: Tensor | None = None, kl_coef: float = 0.0, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """The advantages of `_generate_and_score_completions` of GRPO or RLOO, given the rewards of its samples."""
        rows = len(reward_B)
        responses = [[1] * length for length in lengths or [2] * rows]
        policy, reference = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(2))
        logps = {id(policy): logp_BT, id(reference): reference_logp_BT}
        if logp_BT is None:
            logps[id(policy)] = torch.zeros(rows, 2, dtype=reward_B.dtype)
        args = SimpleNamespace(
            per_device_train_batch_size=rows, gradient_checkpointing_kwargs=None,
            steps_per_generation=1, gradient_accumulation_steps=1,
        )  # fmt: skip
        generated: tuple[Any, ...] = ([[5]] * rows, responses, ["x"] * rows)
        if kind == "GRPO":
            generated = ([[5]] * rows, responses, None, ["x"] * rows, None, {}, None, None)
        trainer = trainer_with(
            **settings, model=policy, ref_model=reference, args=args, beta=kl_coef, num_generations=group_size,
            _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False,
            reward_weights=torch.ones(1, dtype=reward_B.dtype), reward_func_names=["r"], reward_clip_range=None,
            environment_factories=None, environments=None, tools=None, num_iterations=1, use_vllm=False,
            multi_objective_aggregation="sum_then_normalize",
            _logs=defaultdict(list, rewards=defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        )  # fmt: skip
        trainer._generate = lambda prompts: generated
        trainer._calculate_rewards = lambda *_: reward_B[:, None].clone()
        trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (logps[id(model)], None, None)
        method = getattr(self, kind)._generate_and_score_completions
        return method(trainer, [{"prompt": "p"} for _ in range(rows)])["advantages"]


def trainer_with(**attributes: Any) -> SimpleNamespace:
    """What the methods read of a trainer that runs in one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, sync_gradients=True,
        gather=lambda value: value, gather_for_metrics=lambda value: value, reduce=lambda value, reduction: value,
    )  # fmt: skip
    standard = {
        "model": SimpleNamespace(training=True), "accelerator": accelerator, "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**standard, **attributes})


def policy_of(trainer: SimpleNamespace, logp_BT: Tensor) -> SimpleNamespace:
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp_BT, torch.zeros_like(logp_BT), None)
    return trainer


def responses(mask_BT: Tensor) -> dict[str, Tensor]:
    prompt = torch.zeros(len(mask_BT), 1, dtype=torch.long)
    return {
        "prompt_ids": prompt, "prompt_mask": prompt + 1,
        "completion_ids": torch.zeros_like(mask_BT, dtype=torch.long), "completion_mask": mask_BT.long(),
    }  # fmt: skip


def chosen_first(value_B: Tensor) -> Tensor:
    """Pairs row by row -> every chosen row, then every rejected one, as TRL has them."""
    return torch.cat([value_B[0::2], value_B[1::2]])


def of_tokens(logp_BT: Tensor, mask_BT: Tensor) -> SimpleNamespace:
    """A model's answer: entry t is of token t + 1, and 0 where there is no label."""
    assert not mask_BT[:, 0].any(), "no model has a log-probability of the first token"
    log_probs = torch.where(mask_BT, logp_BT, 0.0)[:, 1:]
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def answering(outputs: Iterator[Any]) -> Any:
    return lambda **_: next(outputs)


def last(trainer: SimpleNamespace) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if isinstance(values, list)}
