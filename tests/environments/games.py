"""Well-behaved environments and tools, for the adapters."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Literal


class Guess:
    """A number between 1 and `high`, told higher or lower; (observation, reward, done)."""

    def __init__(self, high: int = 100) -> None:
        self.high = high

    def reset(self, row: dict, seed: int) -> str:
        self.number = random.Random(seed).randint(1, self.high)
        return f"Guess a number from 1 to {self.high}."

    def step(self, text: str) -> tuple[str, float, bool]:
        guess = int(text)
        if guess == self.number:
            return "", 1.0, True
        return ("higher" if guess < self.number else "lower"), 0.0, False


class Counter:
    """As TRL's environment_factory takes it: public methods are tools, get_reward the final reward."""

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit

    def reset(self, **row: object) -> str | None:
        self.value = 0
        self.goal = int(str(row["goal"]))
        return f" Reach {self.goal}." if row.get("told") else None

    def increment(self, step: int) -> int:
        """
        Increment the counter.

        Args:
            step: How much to add to
                the counter.

        Returns:
            The new value.
        """
        if step > self.limit:
            raise ValueError(f"{step} is more than {self.limit}")
        self.value += step
        return self.value

    async def look(self) -> dict:
        """Look at the counter."""
        await asyncio.sleep(0)
        return {"value": self.value, "é": None}

    def _hidden(self) -> None:
        pass

    def get_reward(self) -> float:
        return float(self.value == self.goal)


def add(a: float, b: float = 1.0) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


async def shout(text: str, times: Literal[1, 2] = 1) -> str:
    """Shout.

    Args:
        text: What to shout.
        times: How often.
    """
    await asyncio.sleep(0.01)
    return text.upper() * times


def _private() -> None:
    pass


class Forms:
    """Each form that a step may return, by the name of the text."""

    tools = ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},)

    async def reset(self, row: dict, seed: int) -> list[dict]:
        return [{"role": "system", "content": "rules"}, {"role": "user", "content": str(row)}]

    async def step(self, text: str, tool_calls: list[dict]) -> object:
        return getattr(self, text)(tool_calls)

    def text(self, _: object) -> object:
        return "seen"

    def nothing(self, _: object) -> object:
        return None

    def three(self, _: object) -> object:
        return "seen", 1, True

    def four(self, _: object) -> object:
        return "seen", 0.5, False, {"x": 2, "name": "y"}

    def gymnasium(self, _: object) -> object:
        return {"board": [1, 2]}, 0.5, False, True, {}

    def fields(self, _: object) -> object:
        return {"messages": [{"role": "user", "content": "seen"}], "reward": 2.0, "done": True, "metrics": {"x": 1}}

    def thing(self, _: object) -> object:
        return Heard("seen", 0.25, True)

    def calls(self, tool_calls: list[dict]) -> object:
        return str(tool_calls)

    def get_reward(self) -> float:
        return 3.0


@dataclass
class Heard:
    """A turn as an object of one's own."""

    observation: str
    reward: float
    done: bool


class Gymnasium:
    """Gymnasium's reset."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        return f"{seed} {options}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        return action, 0.0, False, True, {}
