"""Guards: what a step's row of metrics says of a run that has gone wrong (no torch; only the rank that has rows looks)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aligner.config.guards import EmptyBatch, GuardConfig, Limit, Streak


@dataclass(frozen=True)
class Finding:
    """A guard that has something to say of this step."""

    guard: str
    """Its name under `guards`."""
    stop: bool
    """The job must end."""
    say: bool
    """It is due on the console."""
    text: str


class Guards:
    """Looks at one row after the other."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._in_row: dict[str, int] = {}
        self._last_report: dict[str, int] = {}
        self._reward: float | None = None

    def look(self, step: int, row: Mapping[str, float]) -> list[Finding]:
        """What the guards find in the row of `step`; each row is looked at once, in order."""
        skipped = sum(value for name, value in row.items() if name.endswith("skipped_steps"))
        empty = None if "tokens" not in row else not row["tokens"] or "empty_steps" in row
        findings = [
            self._limit("kl", step, row.get("kl"), "a KL to the reference", "nats"),
            self._limit("logp_gap", step, row.get("gap"), "log-probabilities of rollout and policy differ by", "nats"),
            self._streak("empty_batch", step, empty, "a batch, or a minibatch, without a token to train on"),
            self._streak(
                "zero_advantages", step, _is(row.get("advantage_abs_max"), 0.0),
                "every advantage is 0, so the rewards teach nothing",
            ),
            self._streak(
                "stuck_reward", step, self._same_reward(row.get("reward")),
                f"the mean reward is {row.get('reward')}, unchanged",
            ),
            self._skipped(step, skipped),
        ]  # fmt: skip
        return [one for one in findings if one is not None]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can hold it."""
        return {"in_row": dict(self._in_row), "said": dict(self._last_report), "reward": self._reward}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._in_row, self._last_report = dict(state["in_row"]), dict(state["said"])
        self._reward = state["reward"]

    def _same_reward(self, reward: float | None) -> bool | None:
        if reward is None or math.isnan(reward):
            return None
        before, self._reward = self._reward, reward
        return reward == before

    def _limit(self, name: str, step: int, value: float | None, quantity: str, unit: str) -> Finding | None:
        guard: Limit = getattr(self.config, name)
        above = None if value is None else not value <= guard.limit  # a NaN is above every limit
        text = (
            f"{quantity} of {value:.3g} {unit}"
            if name == "kl" and value is not None
            else f"{quantity} {value or 0:.3g} {unit}"
        )
        return self._judge(name, step, above, guard, f"{text}, beyond guards.{name}.limit={guard.limit:g}")

    def _streak(self, name: str, step: int, there: bool | None, text: str) -> Finding | None:
        return self._judge(name, step, there, getattr(self.config, name), text)

    def _skipped(self, step: int, count: float) -> Finding | None:
        """Steps that the update itself has left out; it stops by itself."""
        if not count:
            return None
        return self._finding(
            "not_finite", step, False, f"{count:.0f} optimizer step(s) left out: loss or gradient not finite"
        )

    def _judge(
        self, name: str, step: int, there: bool | None, guard: Limit | Streak | EmptyBatch, text: str
    ) -> Finding | None:
        """`there`: None where the row does not tell, which neither adds to a streak nor ends it."""
        if guard.action == "off" or there is None:
            return None
        self._in_row[name] = self._in_row.get(name, 0) + 1 if there else 0
        if not there:
            return None
        times = self._in_row[name]
        if times < guard.steps:
            return None
        since = f" for {times} steps in a row" if times > 1 else ""
        return self._finding(name, step, guard.action == "stop", f"{text}{since}")

    def _finding(self, name: str, step: int, stop: bool, text: str) -> Finding:
        last = self._last_report.get(name)
        say = stop or last is None or step - last >= self.config.say_every
        if say:
            self._last_report[name] = step
        return Finding(name, stop, say, f"guards.{name}: {text} (step {step})")


def _is(value: float | None, wanted: float) -> bool | None:
    return None if value is None else value == wanted
