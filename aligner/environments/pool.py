"""Many episodes at once in environment processes outside the ranks; nothing here waits but `poll`."""

from __future__ import annotations

from typing import Any

from aligner.environments.config import EnvironmentConfig
from aligner.environments.protocol import Action, Failed, Finished, Opened, PoolEvent, Stepped, Turn

__all__ = ["Action", "EnvironmentPool", "Failed", "Finished", "Opened", "PoolEvent", "Stepped", "Turn"]


class EnvironmentPool:
    """Environment processes and the episodes in them.

    An episode is `open`, then `step` after each event, then `finish` (or `drop`); each of the first three is answered by one
    event of `poll`, in any order between episodes. A `Failed` takes the place of whichever event was expected.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Start the processes and wait until the environment is imported in each.

        Raises:
            ValueError: the environment cannot be made with these settings; names the setting.
        """
        self._config = config

    def open(self, episode: int, row: dict[str, Any], seed: int) -> None:
        """Reset an environment for an episode (a number that is not open): `Opened`. Beyond processes x
        episodes_per_process it waits until another is closed.

        Args:
            row: the task: a JSON row of the data set.
            seed: of everything that the environment draws.
        """

    def step(self, episode: int, action: Action) -> None:
        """Give the environment the policy's turn: `Stepped`."""

    def finish(self, episode: int) -> None:
        """Ask for the final reward (None at once, where the environment has none) and close the episode: `Finished`."""

    def poll(self, wait_s: float) -> list[PoolEvent]:
        """Events that have become ready; waits at most `wait_s` seconds for the first one."""
        return []

    def drop(self, episode: int) -> None:
        """Close an episode without an event; its running call is abandoned. Ignored where it is not open."""

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: failures by kind, processes started anew, episodes replayed; and the time of calls."""
        return {}

    def close(self) -> None:
        """End all processes. Idempotent."""
