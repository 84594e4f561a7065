"""Settings of the reward role, and of each component of a reward that is a sum of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.bounds import AtLeast, Between, Finite, MoreThan, OneOf


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of an LLM judge: one OpenAI-compatible chat completion per row."""

    model: str = ""
    """Name of the model at the endpoint."""
    prompt: str = ""
    """Prompt template with {prompt}, {response} and the row's fields by name; {{ and }} are literal braces."""
    pattern: str = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose one group is the score; the last match in the judge's answer counts."""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """Longest answer of the judge, in tokens."""
    temperature: Annotated[float, AtLeast(0, "0: greedy")] = 0.0
    """The judge's sampling temperature; 0 is greedy."""


@dataclass(frozen=True)
class RewardComponent:
    """One summand of the reward: exactly one of rule, url, model and environment says where its raw value comes from."""

    rule: str | None = None
    """`package.module.function` or `path/to/file.py:function`, called as fn(prompt, response, **fields) -> float."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the rule; a row's field of the same name takes precedence."""
    url: str | None = None
    """HTTP endpoint that scores rows (or, with judge, answers chat completions)."""
    model: bool | str = False
    """The score of a reward model: true for the role reward_model, or the name of a models.NAME of kind reward_model."""
    environment: bool = False
    """The episode's reward, as its environment gave it (environment.target)."""
    weight: Annotated[float, Finite()] = 1.0
    """Factor in the sum; 0: only logged or used as a gate, and it may be missing in a row."""
    normalize: Annotated[str, OneOf("none", "batch")] = "none"
    """none, or batch: whitened (mean 0, standard deviation 1) over the global batch's rows that have a value."""
    clip: tuple[float, float] | None = None
    """Clip raw values to [low, high] before normalization."""
    gate: str | None = None
    """Name of another component: this one counts only in rows where that one's raw value exceeds gate_above."""
    gate_above: Annotated[float, Finite()] = 0.0
    """Threshold of the gate, in the unit of its raw value."""
    gate_value: Annotated[float, Finite()] = 0.0
    """Value of this component (before weight) in rows where the gate is closed."""
    keep_special_tokens: bool | None = None
    """A rule or an endpoint gets the response with its special tokens; none: reward.keep_special_tokens."""
    workers: Annotated[int | None, AtLeast(1)] = None
    """Worker processes of a rule, or concurrent requests of a url, per rank; null: reward.workers."""
    timeout_s: Annotated[float | None, Finite(), MoreThan(0)] = None
    """Limit for one row (url: one request), in seconds; none: reward.timeout_s."""
    rows_per_request: Annotated[int, AtLeast(1)] = 16
    """url: rows in one request; a judge always has 1."""
    retries: Annotated[int, AtLeast(0)] = 3
    """url: retries after a refused connection, a timeout, 408, 425, 429 or 5xx."""
    backoff_s: Annotated[float, Finite(), AtLeast(0)] = 0.5
    """url: wait before the first retry, in seconds; doubles with each retry, up to 30."""
    token_env: str | None = None
    """url: environment variable that holds the bearer token; the token itself is never part of a configuration."""
    judge: JudgeConfig | None = None
    """url: use a language model there as a judge."""


@dataclass(frozen=True)
class RewardConfig:
    """Settings of the reward: one rule, run in CPU worker processes of the reward role's ranks, or a weighted sum of components."""

    rule: str = "aligner.reward.rules.exact_match"
    """`package.module.function` or `path/to/file.py:function`, called as fn(prompt, response, **fields) -> float."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the rule; a row's own field of the same name comes first."""
    components: dict[str, Any] = field(default_factory=dict)
    """In place of rule and kwargs, by name: {rule|url|model|environment, weight, normalize, clip, gate, ...}, each a summand
    (`RewardComponent` in aligner/reward/config.py explains every setting; conf/reward/weighted.yaml is an example)."""
    keep_special_tokens: bool = False
    """Pass responses with their special tokens (<|im_end|>, ...), including the stop token, to rules and endpoints."""
    workers: Annotated[int, AtLeast(1)] = 1
    """Worker processes of each rule (requests in flight of each url) on each rank."""
    timeout_s: Annotated[float, Finite(), MoreThan(0)] = 5.0
    """Limit for one row (url: one request), in seconds."""
    memory_mib: Annotated[int | None, AtLeast(256)] = 4096
    """Limit of the private memory of a worker process and of each process that it starts, in MiB; beyond it the row fails
    with MemoryError. null: no limit (a rule that leaks memory may then kill the host's ranks)."""
    max_missing: Annotated[float, Between(0, 1)] = 0.5
    """Largest fraction of a batch's rows without a reward (failed, timed out, unparsable), 0 to 1; above it the job stops."""
