"""Well-behaved environments and tools, for the adapters."""

from __future__ import annotations

import random


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
