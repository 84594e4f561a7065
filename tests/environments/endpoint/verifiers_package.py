"""The environment of verifiers that is played, Hangman, in the virtual environment of that package (see packages.py)."""

from __future__ import annotations

import json
from pathlib import Path

from tests.environments.packages import interpreter

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
SETTINGS = {
    "taskset": {"id": "textarena", "game": "Hangman-v0"},
    "harness": {"id": "null"},
    "renderer": {"name": "default"},
}


def write_words(folder: Path) -> Path:
    """The words to guess: NLTK's corpus is a download, so that a file stands for it. Returns NLTK_DATA."""
    words = folder / "nltk" / "corpora" / "words"
    words.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (words / name).write_text("apple\nbread\nchair\nhouse\n")
    return folder / "nltk"


def verifiers_program(folder: Path) -> list[str]:
    """The command of the example for `SETTINGS`."""
    file = folder / "hangman.json"
    file.write_text(json.dumps(SETTINGS))
    return [interpreter("verifiers"), str(EXAMPLES / "verifiers_agent.py"), str(file)]
