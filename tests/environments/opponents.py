"""An opponent for TicTacToe."""

import re


class LastFree:
    """Plays the last square that the board offers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, observation: str) -> str:
        return f"[{re.findall(r'[0-8]', observation.rpartition('Available Moves')[2])[-1]}]"
