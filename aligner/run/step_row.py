"""What rank 0 learns of one iteration: a row of metrics. Values come from the roles that hold them."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from aligner.algorithms.step import Step
from aligner.reward.role import Reward, Rewards
from aligner.roles.build import Roles
from aligner.rollout.episodes.figures import Figures, episode_metrics
from aligner.run.step_stats import StepStats, merged, step_stats_of
from aligner.spmd.ref import Ref
from aligner.spmd.transfer import read_on_rank0
from aligner.spmd.world import World
from aligner.trainer.policy import Policy

LOGGED_SCORES = ("reward_B", "status_B", "components", "component_status")
"""Fields of `Rewards` that the row is made of."""


def step_row(
    world: World, roles: Roles, result: Step, seconds: float, signal: str
) -> tuple[dict[str, float], StepStats]:
    """Everything known of one iteration, on rank 0. A collective of the world: one message from each rank, up a tree.

    Args:
        seconds: of the iteration, on this rank.
        signal: what asks this rank to save and leave; "": nothing.

    Returns:
        (metrics, what all ranks have said) on rank 0; ({}, this rank's own) elsewhere.
    """
    policies = (role for role in roles.trainable if isinstance(role, Policy))
    own_stats = step_stats_of(
        roles.built,
        [row for policy in policies if policy.syncs for row in policy.syncs.latest()],
        world.residency.meter.take(),
        world.residency.take_figures(),
        signal,
        {key: one for role in roles.built if isinstance(role, Reward) for key, one in role.take_scored().items()},
        reduce(Figures.merged, (engine.take_figures() for engine in roles.engines), Figures()),
    )
    collected = read_on_rank0(world, _logged(result), own_stats, merged)
    if collected is None:
        return {}, own_stats
    values, stats = collected
    row: dict[str, float] = dict(values.get("metrics", {}))
    for name, value in result.extra_metrics.items():
        if isinstance(value, Ref):
            row |= {f"{name}_{key}": number for key, number in values[f"extra_metrics.{name}"].items()}
        else:
            row[name] = value
    if result.scores is not None:
        row |= Rewards(response=[], **{name: values[name] for name in LOGGED_SCORES}).row()
    if result.samples is not None:
        row["length"] = values["response_len_B"].float().mean().item()
        if values["truncated_B"] is not None:
            row["truncated"] = values["truncated_B"].float().mean().item()
        if values["episodes"] is not None:
            row |= episode_metrics(values["episodes"], values["length_B"].sum().item())
    row |= stats.row()
    row["seconds"] = seconds
    if "tokens" in row:
        row["tokens_per_second"] = row["tokens"] / seconds
    return row, stats


def _logged(result: Step) -> dict[str, Ref]:
    """The values that a row is made of, by name."""
    refs = {f"extra_metrics.{name}": value for name, value in result.extra_metrics.items() if isinstance(value, Ref)}
    if result.metrics is not None:
        refs["metrics"] = result.metrics
    if result.scores is not None:
        refs |= {name: result.scores[name] for name in LOGGED_SCORES}
    if result.samples is not None:
        refs |= {name: result.samples[name] for name in ("length_B", "truncated_B")}
        refs["response_len_B"] = _response_lengths(result.samples)
        refs["episodes"] = _without_messages(result.samples["episodes"])
    return refs


def _response_lengths(samples: Ref) -> Ref:
    """Sampled tokens of each row; the same ranks hold it."""
    value = None if samples.value is None else samples.value.response_len_B
    return replace(samples, value=value, read_cache={}, _fields={})


def _without_messages(episodes: Ref) -> Ref:
    """What `episode_metrics` reads; the same ranks hold it."""
    value = episodes.value and [{**record, "messages": []} for record in episodes.value]
    return replace(episodes, value=value, read_cache={}, _fields={})
