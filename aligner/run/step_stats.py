"""What every rank has to say at the end of a step, merged on its way to the first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aligner.report.metric_registry import TIMED_CALLS
from aligner.reshard.transfer.sync_stats import SyncStats, total
from aligner.rollout.episodes.figures import Figures
from aligner.spmd.memory_account import MemoryFigures
from aligner.spmd.role import Role


@dataclass(frozen=True)
class StepStats:
    """One rank's, or several ranks' together."""

    most: dict[str, float] = field(default_factory=dict)
    """Metrics of which the highest rank's counts, such as seconds of a phase."""
    syncs: tuple[SyncStats, ...] = ()
    """The last transfer of weights."""
    asked: str = ""
    """The signal that asks the job to leave."""
    figures: MemoryFigures = field(default_factory=MemoryFigures)
    """What residency decides by."""
    scored: Mapping[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    """(call of the reward, row of its batch) -> (the prompt's index, the reward); see `Reward.take_scored`."""
    playing: Figures = field(default_factory=Figures)
    """Of rollout replicas, while they played episodes."""

    def row(self) -> dict[str, float]:
        """The metrics."""
        return {**(self.syncs[0].metrics() if self.syncs else {}), **self.most, **self.playing.metrics()}

    def rewards(self) -> dict[int, list[float]]:
        """The prompt's index -> rewards of its samples, whichever ranks scored them."""
        by_prompt: dict[int, list[float]] = {}
        for _, (index, reward) in sorted(self.scored.items()):
            by_prompt.setdefault(index, []).append(reward)
        return by_prompt


def step_stats_of(
    roles: Sequence[Role],
    syncs: Sequence[SyncStats],
    memory: Mapping[str, float],
    figures: MemoryFigures,
    asked: str = "",
    scored: Mapping[tuple[int, int], tuple[int, float]] | None = None,
    playing: Figures | None = None,
) -> StepStats:
    """This rank's since the last time; `memory` in GiB by role call."""
    seconds: dict[str, float] = {}
    for role in roles:
        for call, taken in role.seconds.items():
            seconds[call] = seconds.get(call, 0.0) + taken
        role.seconds.clear()
    most = {f"seconds_{phase}": seconds[call] for call, phase in TIMED_CALLS.items() if call in seconds}
    most |= {f"memory_{phase}": memory[call] for call, phase in TIMED_CALLS.items() if call in memory}
    most |= {"memory_peak": memory["peak"]} if "peak" in memory else {}
    return StepStats(most, (total(syncs),) if syncs else (), asked, figures, scored or {}, playing or Figures())


def merged(one: StepStats, other: StepStats) -> StepStats:
    """Both ranks' together; associative."""
    names = [*one.most, *(name for name in other.most if name not in one.most)]
    most = {name: max(most[name] for most in (one.most, other.most) if name in most) for name in names}
    syncs = one.syncs + other.syncs
    figures = one.figures.merged(other.figures)
    scored = {**one.scored, **other.scored}
    playing = one.playing.merged(other.playing)
    return StepStats(most, (total(syncs),) if syncs else (), one.asked or other.asked, figures, scored, playing)
