"""Settings of models on a training backend: the backend, precision, optimizer, schedule, microbatches, recompute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from aligner.trainer.engines import BACKENDS


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping and a warm-up schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of a decaying schedule, as a fraction of the peak, 0 to 1."""
    schedule: str = "constant"
    """After warm-up: constant, linear or cosine decay to lr x min_lr_ratio at decay_steps."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from lr / warmup_steps."""
    decay_steps: int = 0
    """Optimizer steps until the decay ends; 0 means the whole run."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.95
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases (one-dimensional parameters) are left out."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1; Megatron's distributed optimizer)."""


CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "recompute": ("none", "selective", "full"),
    "reduction": ("token_mean", "sequence_mean", "fixed"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}
AT_LEAST = {
    "micro_tokens": 1,
    "minibatches": 1,
    "epochs": 1,
    "fixed_length": 0,
    "optimizer.lr": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
}


@dataclass(frozen=True)
class TrainingConfig:
    """A model on a training backend and how a batch passes through it."""

    engine: str = "megatron"
    """Training backend: megatron (Megatron-core)."""
    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16 (bfloat16 keeps float32 gradients and master weights, which start from
    the digits that the checkpoint has, not from those rounded to bfloat16)."""
    micro_tokens: int = 16384
    """Tokens packed into one microbatch, at most (one longer row makes a microbatch of its own). Context ranks share
    them."""
    forward_micro_tokens: int | None = None
    """The same where nothing is learned (logprobs, values, scores), which keeps no activations; null: micro_tokens."""
    recompute: str = "none"
    """Activation recompute in backward: none, selective (attention only) or full."""
    reduction: str = "token_mean"
    """Mean of a loss per token over the global batch: token_mean, sequence_mean or fixed (see fixed_length)."""
    fixed_length: int = 0
    """Tokens that reduction=fixed divides each row by (Dr. GRPO); 0 means sampling.max_tokens."""
    minibatches: int = 1
    """Optimizer steps that one batch is cut into."""
    epochs: int = 1
    """Passes over each batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""

    def check(self, name: str) -> None:
        """Raises ValueError naming the setting, which begins with `name`, and the values that would work."""
        for key, allowed in (CHOICES | {"engine": tuple(BACKENDS)}).items():
            if attrgetter(key)(self) not in allowed:
                raise ValueError(f"{name}.{key}={attrgetter(key)(self)} is unknown; use {', '.join(allowed)}.")
        for key, least in AT_LEAST.items():
            if not attrgetter(key)(self) >= least:
                raise ValueError(f"{name}.{key}={attrgetter(key)(self)} must be at least {least}.")
        if self.forward_micro_tokens is not None and self.forward_micro_tokens < 1:
            raise ValueError(
                f"{name}.forward_micro_tokens={self.forward_micro_tokens} must be at least 1, or null for micro_tokens."
            )
        adam = self.optimizer
        for key, beta in (("beta1", adam.beta1), ("beta2", adam.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}.optimizer.{key}={beta} must be in [0, 1).")
        if not 0 <= adam.min_lr_ratio <= 1:
            raise ValueError(f"{name}.optimizer.min_lr_ratio={adam.min_lr_ratio} must be between 0 and 1.")


@dataclass(frozen=True)
class PolicyConfig(TrainingConfig):
    """The trained language model, which starts from model.path."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen copy of the starting model; what is null is as the policy's."""

    engine: str | None = None
    """Training backend: megatron (Megatron-core). null: policy.engine."""
    dtype: str | None = None
    """Parameters and activations: float32 or bfloat16. Another one than the policy's rounds otherwise, so that the KL
    to the reference does not start at 0. null: policy.dtype."""
    micro_tokens: int | None = None
    """Tokens packed into one microbatch, at most. null: policy.forward_micro_tokens, or policy.micro_tokens."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.engine not in (*BACKENDS, None):
            raise ValueError(f"reference.engine={self.engine} is unknown; use {', '.join(BACKENDS)} or null.")
        if self.dtype not in (*CHOICES["dtype"], None):
            raise ValueError(f"reference.dtype={self.dtype} is unknown; use {', '.join(CHOICES['dtype'])} or null.")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ValueError(
                f"reference.micro_tokens={self.micro_tokens} must be at least 1, or null for the policy's."
            )

    def over(self, policy: PolicyConfig) -> PolicyConfig:
        """The reference's settings: the policy's, but for what is said here."""
        return replace(
            policy,
            engine=self.engine or policy.engine,
            dtype=self.dtype or policy.dtype,
            forward_micro_tokens=self.micro_tokens or policy.forward_micro_tokens,
        )


@dataclass(frozen=True)
class CriticConfig(TrainingConfig):
    """The value model of PPO."""

    path: str | None = None
    """Hugging Face folder to start from: a language model, which gets a new head, or one for sequence classification
    with num_labels=1. null: model.path."""


@dataclass(frozen=True)
class RewardModelConfig(TrainingConfig):
    """The model that scores whole responses; frozen unless the loop updates it."""

    path: str | None = None
    """Hugging Face folder to start from: a language model, which gets a new head, or one for sequence classification
    with num_labels=1. null: model.path."""
