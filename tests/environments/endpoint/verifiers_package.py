"""Where verifiers is installed, and the environment of it that is played: Hangman."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"
PYTHON = "ALIGNER_VERIFIERS_PYTHON"
"""Variable with the interpreter of an environment in which verifiers, openai, textarena, nltk and uv are installed."""
SETTINGS = {
    "taskset": {"id": "textarena", "game": "Hangman-v0"},
    "harness": {"id": "null"},
    "renderer": {"name": "default"},
}


def own_python() -> str:
    """That interpreter; without one the test is skipped."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"set {PYTHON} to the interpreter of an environment with verifiers, openai, textarena, nltk and uv")
    return python


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
    return [own_python(), str(EXAMPLES / "verifiers_agent.py"), str(file)]
