"""The largest microbatches of a job's roles, from its settings and its rows (no torch)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from aligner.data.preferences import Pair
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import role_layout
from aligner.trainer.activations import Activations, Microbatch
from aligner.trainer.config import MIN_SHARED_TOKENS
from aligner.trainer.engines import backend

if TYPE_CHECKING:
    from aligner.config.schema import Config
    from aligner.data.sets import DataSets
    from aligner.data.tokenized_answer import TokenizedAnswer
    from aligner.models.spec import ModelSpec


def longest_row(config: Config, data: DataSets) -> int:
    """Tokens of the longest row that a role reads: an answer with its prompt, a prompt with the longest response, or an episode of one
    context. An episode of several has those of each (`max_contexts`)."""
    if config.data.kind != "prompts":
        return max(1, data.longest)
    if config.environment.enabled:
        return min(config.environment.max_tokens or math.inf, config.rollout.max_model_len or math.inf)  # type: ignore[return-value]
    prompt = max((len(one.tokens) for one in data.known), default=config.data.max_prompt_tokens)
    return min(prompt + config.sampling.max_tokens, config.rollout.max_model_len or math.inf)  # type: ignore[return-value]


def step_lengths(config: Config, data: DataSets, min_shared: int | None) -> list[int]:
    """Tokens of the rows of a training step over all data shards, at most; a loop without `algorithm.group_size` has one
    response for each prompt.

    Args:
        min_shared: a prompt of so many tokens or more counts with its first answer only (`share_prefix`); None: with each.
    """
    count = config.data.prompts_per_step
    if config.data.kind == "prompts":
        longest, group = longest_row(config, data), int(config.algorithm.get("group_size", 1))
        prompt = longest - config.sampling.max_tokens
        if config.environment.enabled:  # what follows the prompt may be any length; a program makes prompts of its own
            prompt = 0 if config.environment.agent.command else _shortest_prompt(data)
        rest = longest - _shared(prompt, min_shared)
        return ([longest] + [rest] * (group - 1)) * count
    groups = []
    for first, *others in _answers(data):
        shared = _shared(first.prompt_len, min_shared)
        groups.append([len(first.tokens), *(len(other.tokens) - shared for other in others)])
    return [length for group in sorted(groups, key=sum, reverse=True)[:count] for length in group]


def _shared(prompt: int, min_shared: int | None) -> int:
    """Tokens that the answers to a prompt share: each computes the last one for itself."""
    return max(0, prompt - 1) if min_shared is not None and prompt - 1 >= min_shared else 0


def _shortest_prompt(data: DataSets) -> int:
    return min((len(one.tokens) for one in data.known), default=1)


def _answers(data: DataSets) -> list[tuple[TokenizedAnswer, ...]]:
    """Of each row: two of a pair."""
    return [(row.chosen, row.rejected) if isinstance(row, Pair) else (row,) for row in data.known]


def _answer_lengths(data: DataSets) -> list[list[int]]:
    """Tokens of the answers of each row, with their prompts."""
    return [[len(one.tokens) for one in answers] for answers in _answers(data)]


def _alike(config: Config, data: DataSets) -> bool:
    """Whether all rows have one length; responses that are generated do not."""
    return config.data.kind != "prompts" and len({length for row in _answer_lengths(data) for length in row}) == 1


def _predicting(config: Config, data: DataSets) -> float:
    """Fraction of a microbatch's tokens that come before a trained one, at most; what a prompt's answers share counts once."""
    if config.data.kind == "prompts":
        shortest = _shortest_prompt(data)
        drawn = config.sampling.max_tokens * int(config.algorithm.get("group_size", 1))
        drawn *= config.environment.max_turns if config.environment.enabled else 1
        return drawn / (shortest + drawn)
    rows = [(answers, min(one.prompt_len for one in answers) * (len(answers) - 1)) for answers in _answers(data)]
    fractions = (
        sum(sum(one.mask) for one in answers) / (sum(len(one.tokens) for one in answers) - shared)
        for answers, shared in rows
    )
    return min(1.0, max(fractions, default=1.0))


def microbatch(
    config: Config, role: str, data: DataSets, mesh: Mesh, forward: bool, contexts: int = 1
) -> tuple[Microbatch, int]:
    """(the largest microbatch, number of them in an optimizer step on a data shard).

    Args:
        forward: of a pass without gradients over a whole step.
        contexts: segments of an episode, each of its own attention and as long as a row of one.
    """
    settings = config.settings(role)
    lengths = step_lengths(config, data, MIN_SHARED_TOKENS[settings.share_prefix])
    steps = mesh.data * (1 if forward else settings.minibatches)
    budget = (settings.forward_micro_tokens if forward else None) or settings.micro_tokens
    unit = 2 if data.known and isinstance(data.known[0], Pair) and not forward else 1  # rows that are never split
    shard = [contexts * length for length in lengths[: max(unit, math.ceil(len(lengths) / steps))]]
    tokens = min(sum(shard), max(budget, sum(shard[:unit])))
    batch = Microbatch(tokens, max(lengths), _alike(config, data), _predicting(config, data))
    return batch, math.ceil(sum(shard) / tokens)


def role_activations(
    config: Config,
    role: str,
    roles: Collection[str],
    data: DataSets,
    spec: ModelSpec,
    mesh: Mesh,
    cpu: bool,
    contexts: int = 1,
) -> Activations | None:
    """Bytes that the role's calls take on a rank beside what it holds, at most; None: it is not a model of a training
    backend that can tell. `contexts`: see `microbatch`."""
    if not config.role(role).kind.on_trainer:
        return None
    settings = config.settings(role)
    estimate = backend(settings.engine).activations
    if estimate is None:
        return None
    parallel = role_layout(config.placement, config.role(role)).sequence_parallel
    (batch, count), (forward_batch, _) = (
        microbatch(config, role, data, mesh, forward, contexts) for forward in (False, True)
    )
    taken = estimate(spec, mesh, settings, parallel, batch, forward_batch, count, "cpu" if cpu else "cuda")
    return taken if config.learns(role, roles) else Activations(0.0, taken.inference)
