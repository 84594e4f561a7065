"""Settings of the reward role, and of each component of a reward that is a sum of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.bounds import AtLeast, Between, Finite, MoreThan, OneOf


@dataclass(frozen=True)
class JudgeConfig:
    """A language model asked for a score in words: an OpenAI-compatible chat completion for each row."""

    model: str = ""
    """Name of the model at the endpoint."""
    prompt: str = ""
    """What it is asked: {prompt}, {response} and the row's own fields by name stand in braces; {{ and }} are braces."""
    pattern: str = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"
    """Regular expression of which one group is the score; its last match in the judge's answer counts."""
    max_tokens: Annotated[int, AtLeast(1)] = 512
    """Longest answer of the judge, in tokens."""
    temperature: Annotated[float, AtLeast(0, "0: greedy")] = 0.0
    """The judge's sampling temperature; 0 is greedy."""


@dataclass(frozen=True)
class RewardComponent:
    """One summand of the reward: exactly one of rule, url and model says where its raw value comes from."""

    rule: str | None = None
    """`package.module.function` or `path/to/file.py:function`, called as fn(prompt, response, **fields) -> float."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the rule; a row's own field of the same name comes first."""
    url: str | None = None
    """HTTP endpoint that scores rows (or, with judge, answers chat completions)."""
    model: bool = False
    """The score of the role reward_model."""
    weight: Annotated[float, Finite()] = 1.0
    """Factor in the sum; 0: only observed or used as a gate, and a row may lack it."""
    normalize: Annotated[str, OneOf("none", "batch")] = "none"
    """none, or batch: whitened (mean 0, standard deviation 1) over the whole batch's rows that have a value."""
    clip: tuple[float, float] | None = None
    """Raw values are cut to [low, high] before they are normalized."""
    gate: str | None = None
    """Another component: this one counts only in rows where that one's raw value is above gate_above."""
    gate_above: Annotated[float, Finite()] = 0.0
    """See gate; in the unit of the gate's raw value."""
    gate_value: Annotated[float, Finite()] = 0.0
    """What this component adds (times weight) in rows where the gate is closed."""
    keep_special_tokens: bool | None = None
    """A rule or an endpoint gets the response with its special tokens; none: reward.keep_special_tokens."""
    workers: Annotated[int | None, AtLeast(1)] = None
    """Worker processes of a rule, requests in flight of a url, on each rank; none: reward.workers."""
    timeout_s: Annotated[float | None, Finite(), MoreThan(0)] = None
    """Limit for one row (url: one request), in seconds; none: reward.timeout_s."""
    rows_per_request: Annotated[int, AtLeast(1)] = 16
    """url: rows in one request; a judge always has 1."""
    retries: Annotated[int, AtLeast(0)] = 3
    """url: further attempts after a refused connection, a timeout, 429 or 5xx."""
    backoff_s: Annotated[float, Finite(), AtLeast(0)] = 0.5
    """url: wait before the first further attempt, in seconds; it doubles with each, up to 30."""
    token_env: str | None = None
    """url: environment variable that holds the bearer token; the token itself never stands in a configuration."""
    judge: JudgeConfig | None = None
    """url: ask a language model there."""


@dataclass(frozen=True)
class RewardConfig:
    """What scores a response: one rule in worker processes on the host CPUs of the reward role's ranks, or a sum."""

    rule: str = "aligner.reward.rules.exact_match"
    """`package.module.function` or `path/to/file.py:function`, called as fn(prompt, response, **fields) -> float."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the rule; a row's own field of the same name comes first."""
    components: dict[str, Any] = field(default_factory=dict)
    """In place of rule and kwargs, by name: {rule|url|model, weight, normalize, clip, gate, ...}, each a summand
    (`RewardComponent` in aligner/reward/config.py explains every setting; conf/reward/weighted.yaml is an example)."""
    keep_special_tokens: bool = False
    """Rules and endpoints get the response with the special tokens in it (<|im_end|>, ...), the one that ended it too."""
    workers: Annotated[int, AtLeast(1)] = 1
    """Worker processes of each rule (requests in flight of each url) on each rank."""
    timeout_s: Annotated[float, Finite(), MoreThan(0)] = 5.0
    """Limit for one row (url: one request), in seconds."""
    memory_mib: Annotated[int | None, AtLeast(256)] = 4096
    """Private memory of a worker process, in MiB, and of each that it starts: beyond it the row has failed with
    MemoryError. null: no limit, and a rule that eats memory takes the host's ranks with it."""
    max_missing: Annotated[float, Between(0, 1)] = 0.5
    """Fraction of a batch's rows without a score (failed, timed out, unparsable) above which the job stops, 0 to 1."""
