"""Which weights a rollout's engines hold: whose, of which version, and whether they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol


class Holding(Enum):
    """What is in an engine's weights."""

    NOTHING = "nothing"
    """No sync has finished since the engine started."""
    PARTIAL = "partial"
    """A sync has begun and not finished: it is running, or it failed."""
    COMPLETE = "complete"
    EVICTED = "evicted"
    """They were given up to make room for other roles; the next sync writes them anew."""


class WeightSource(Protocol):
    """Where a rollout's weights come from: a policy, as a rollout knows it."""

    name: str
    version: int
    """Updates of its weights so far; the same on every rank."""

    def reshard_to(self, rollout: Any) -> None:
        """Bring its present weights into the rollout's engines. Collective over the world."""


class LoadedWeights:
    """The one record of what a rollout's engines hold; every rank of the world has it, and all say the same.

    Args:
        source: where weights come from that nobody has sent when they are first needed; None: from nowhere.
    """

    def __init__(self, source: WeightSource | None = None) -> None:
        self.source = source
        """Whose weights the last sync that finished has brought, also after they were given up; None before the first."""
        self.version = 0 if source is None else source.version
        """The source's version at that sync: what tokens are marked with as they are drawn."""
        self.holding = Holding.NOTHING

    @property
    def complete(self) -> bool:
        """The engines hold one whole set of weights, and may generate."""
        return self.holding is Holding.COMPLETE

    @property
    def evicted(self) -> bool:
        """The weights were given up."""
        return self.holding is Holding.EVICTED

    def current(self, source: WeightSource) -> bool:
        """Whether the engines hold the present weights of `source`."""
        return self.complete and self.source is source and self.version == source.version

    def begin(self) -> None:
        """A sync overwrites them: there are none until `finish`."""
        self.holding = Holding.PARTIAL

    def finish(self) -> None:
        """The sync wrote every region."""
        self.holding = Holding.COMPLETE

    def evict(self) -> None:
        """They are given up."""
        self.holding = Holding.EVICTED

    @contextmanager
    def loading(self, source: WeightSource) -> Iterator[None]:
        """Around a sync of the present weights of `source`; where it fails there are no valid weights afterwards."""
        self.begin()
        try:
            yield
        except BaseException:
            self.begin()  # also where this rank's part of it has finished
            raise
        self.finish()
        self.source, self.version = source, source.version

    def check(self) -> None:
        """RuntimeError, saying what to call, unless `complete`."""
        match self.holding:
            case Holding.NOTHING:
                raise RuntimeError("the rollout engine has no weights yet; call policy.reshard_to(rollout) first.")
            case Holding.PARTIAL:
                raise RuntimeError(
                    "the rollout engine has no valid weights: the last sync did not finish; call "
                    "policy.reshard_to(rollout) once more."
                )
            case Holding.EVICTED:
                raise RuntimeError(
                    "the rollout engine has no weights: they were given up to make room for other roles; call "
                    "policy.reshard_to(rollout) first, or keep them with residency.keep=[rollout.weights]."
                )

    def check_unchanged(self, rollout: str) -> None:
        """RuntimeError, saying what to call, where the source has other weights by now than at the sync.

        Args:
            rollout: name of the role.
        """
        if self.source is not None and self.version != self.source.version:
            policy = self.source.name
            raise RuntimeError(
                f"{rollout} computes with the weights of {policy}, which has been updated since it gave them; call "
                f"{policy}.reshard_to({rollout}) before generate, and finish what was started before the update, or set "
                "rollout.share_policy_weights=false."
            )

    def source_to_reload(self, rollout: str) -> WeightSource | None:
        """Who must bring the weights before the engines can generate: they were given up, or have not been needed yet.

        None where the engines have weights, and where nobody is known to have any: then `check` says what to do.

        Args:
            rollout: name of the role, for the error.

        Raises:
            RuntimeError: the weights were given up, and their source has others by now.
        """
        if self.holding not in (Holding.NOTHING, Holding.EVICTED) or self.source is None:
            return None
        if self.version != self.source.version:
            policy = self.source.name
            raise RuntimeError(
                f"{rollout}.generate: the engine's weights were given up to make room for other roles, and the role {policy} "
                f"has been updated since they were synced. Call {policy}.reshard_to({rollout}) before generate, or keep "
                f"them with residency.keep=[{rollout}.weights]."
            )
        return self.source
