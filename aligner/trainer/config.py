"""Settings of models on a training backend: the backend, precision, optimizer, schedule, microbatches, recompute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from aligner.bounds import AtLeast, Between, LessThan, OneOf

ENGINES = ("megatron", "fsdp")
"""The training backends, the keys of `aligner.trainer.engines.BACKENDS`."""

MIN_SHARED_TOKENS: Mapping[str, int | None] = {"auto": 8, "on": 1, "off": None}
"""By the value of `share_prefix`: minimum length in tokens of a prefix that is computed once; None: no prefix is."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping and a warm-up schedule."""

    lr: Annotated[float, AtLeast(0)] = 1e-6
    """Peak learning rate."""
    min_lr_ratio: Annotated[float, Between(0, 1)] = 0.0
    """Learning rate at the end of a decaying schedule, as a fraction of the peak, 0 to 1."""
    schedule: Annotated[str, OneOf("constant", "linear", "cosine")] = "constant"
    """After warm-up: constant, linear or cosine decay to lr x min_lr_ratio at decay_steps."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Optimizer steps of linear warm-up from lr / warmup_steps to lr."""
    decay_steps: Annotated[int, AtLeast(0)] = 0
    """Optimizer steps until the decay ends; 0 means the whole run."""
    beta1: Annotated[float, AtLeast(0), LessThan(1)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, AtLeast(0), LessThan(1)] = 0.95
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """Decoupled weight decay; norms and biases (one-dimensional parameters) are excluded."""
    clip_grad: Annotated[float, AtLeast(0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (ZeRO-1; Megatron's distributed optimizer)."""


@dataclass(frozen=True)
class TrainingConfig:
    """A model on a training backend: precision, microbatches, minibatches, optimizer."""

    engine: Annotated[str, OneOf(*ENGINES)] = "megatron"
    """Training backend: megatron (Megatron-core: tensor, pipeline, context and expert parallelism, the families of
    docs/families.md) or fsdp (torch FSDP2 over transformers' own model class: any language model that transformers has)."""
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    """Parameters and activations: float32 or bfloat16 (bfloat16 keeps float32 gradients and master weights; these are read
    from the checkpoint at its own precision, not from the weights rounded to bfloat16)."""
    micro_tokens: Annotated[int, AtLeast(1)] = 16384
    """Maximum tokens packed into one microbatch (a longer row becomes a microbatch of its own), summed over context-parallel
    ranks; tokens that rows share (share_prefix) count once."""
    forward_micro_tokens: Annotated[int | None, AtLeast(1)] = None
    """The same for forward passes without gradients (logprobs, values, scores), which keep no activations; null:
    micro_tokens."""
    recompute: Annotated[str, OneOf("none", "selective", "mlp", "full")] = "none"
    """Activation recompute in backward: none, selective (attention only; saves little under flash kernels), mlp (MLPs and
    experts: most of the memory for a third of full's time; engine=megatron) or full (each layer)."""
    experts: Annotated[str, OneOf("sequential", "grouped")] = "sequential"
    """engine=megatron: sequential computes one expert after the other, grouped all of a rank's experts in one kernel over
    stacked weights (on GPUs bfloat16, of the Ampere generation and later). Checkpoints of one can be continued with the other
    (checkpoint.accept_changes=true)."""
    overlap_grad_reduce: bool = False
    """engine=megatron: sum gradients over data-parallel ranks in buckets while the last microbatch's backward computes, instead
    of after it. The sums are the same. On CPUs, communication takes the cores that compute."""
    reshard_after_forward: bool | None = None
    """engine=fsdp: free a layer's gathered weights after its forward and gather them again in the backward (less memory, as
    ZeRO-3); false keeps them from the first microbatch's forward to the last one's backward (less communication, as ZeRO-2);
    null: true on GPUs, false on CPUs, where communication takes the cores that compute."""
    share_prefix: Annotated[str, OneOf(*MIN_SHARED_TOKENS)] = "auto"
    """Compute common prefixes of a microbatch's rows (samples of one prompt, pairs) once: auto, on or off. Exact up to
    rounding. auto: prefixes of at least 8 tokens, from which on it pays; on: prefixes of any length; off: every row by itself."""
    reduction: Annotated[str, OneOf("token_mean", "sequence_mean", "fixed")] = "token_mean"
    """How a per-token loss is averaged over the global batch: token_mean, sequence_mean or fixed (see fixed_length)."""
    fixed_length: Annotated[int, AtLeast(0)] = 0
    """Number of tokens that reduction=fixed divides each row's sum by (Dr. GRPO); 0 means sampling.max_tokens, in episodes times
    environment.max_turns."""
    minibatches: Annotated[int, AtLeast(1)] = 1
    """Minibatches, one optimizer step each, that a batch is split into."""
    epochs: Annotated[int, AtLeast(1)] = 1
    """Passes over each batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""


@dataclass(frozen=True)
class PolicyConfig(TrainingConfig):
    """The trained language model, initialised from model.path."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen copy of the initial model; null settings are the policy's."""

    engine: Annotated[str | None, OneOf(*ENGINES)] = None
    """Training backend: megatron or fsdp. null: policy.engine."""
    dtype: Annotated[str | None, OneOf("float32", "bfloat16")] = None
    """Parameters and activations: float32 or bfloat16. With another type than the policy's, rounding differs and the KL
    to the reference does not start at 0. null: policy.dtype."""
    micro_tokens: Annotated[int | None, AtLeast(1)] = None
    """Maximum tokens packed into one microbatch. null: policy.forward_micro_tokens, or policy.micro_tokens."""

    def over(self, policy: PolicyConfig) -> PolicyConfig:
        """The reference's complete settings: the policy's, overridden by those that are not null here."""
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
