"""Settings of the trained model: precision, optimizer, schedule, microbatches, recompute."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Shard optimizer state over the data-parallel ranks (Megatron's distributed optimizer)."""


@dataclass(frozen=True)
class PolicyConfig:
    """The trained model and how a batch passes through it."""

    dtype: str = "float32"
    """Parameters and activations: float32 or bfloat16 (bfloat16 keeps float32 master weights and gradients)."""
    micro_tokens: int = 16384
    """Tokens packed into one microbatch, at most (one longer row makes a microbatch of its own)."""
    recompute: str = "none"
    """Activation recompute in backward: none, selective (attention only) or full."""
    reduction: str = "token_mean"
    """Mean of the loss over the global batch: token_mean, sequence_mean or fixed (see fixed_length)."""
    fixed_length: int = 0
    """Tokens that reduction=fixed divides each row by (Dr. GRPO); 0 means sampling.max_tokens."""
    minibatches: int = 1
    """Optimizer steps that one batch is cut into."""
    epochs: int = 1
    """Passes over each batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
