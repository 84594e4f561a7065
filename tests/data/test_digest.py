"""The digest of rows: by what they hold and their order, not by how they are held."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from aligner.data.digest import digest
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.tokenized_answer import TokenizedAnswer

PROMPT = Prompt((1, 2, 3), "1+2=", {"prompt": "1+2=", "answer": "3", "level": 1}, 0)
ANSWER = TokenizedAnswer((1, 2, 3, 4), (False, False, True, True), 2, {"completion": "x"}, 0)
PAIR = Pair(ANSWER, replace(ANSWER, tokens=(1, 2, 5)))
OTHERS = [
    replace(PROMPT, tokens=(1, 2, 4)),
    replace(PROMPT, tokens=(1, 2, 3, 0)),
    replace(PROMPT, tokens=()),
    replace(PROMPT, text="1+2= "),
    replace(PROMPT, fields={**PROMPT.fields, "answer": "4"}),
    replace(PROMPT, fields={**PROMPT.fields, "answer": 3}),
    replace(PROMPT, fields={**PROMPT.fields, "level": 1.5}),
    replace(PROMPT, fields={**PROMPT.fields, "tests": ["a", "b"]}),
    replace(PROMPT, fields={**PROMPT.fields, "tests": ["ab"]}),
    ANSWER,
    replace(ANSWER, mask=(False, True, True, True)),
    replace(ANSWER, prompt_len=3),
    PAIR,
    Pair(PAIR.rejected, PAIR.chosen),
    "1+2=",
]


def test_each_difference_is_one() -> None:
    found = [digest([row]) for row in (PROMPT, *OTHERS)]
    assert len(set(found)) == len(found)
    assert digest([PROMPT, ANSWER]) != digest([ANSWER, PROMPT]) != digest([ANSWER])


def test_equal_rows_are_equal_however_they_came() -> None:
    again = replace(PROMPT, fields=dict(reversed(json.loads(json.dumps(PROMPT.fields)).items())))
    assert digest([again]) == digest((PROMPT,)) == digest(iter([PROMPT]))


def test_the_same_in_another_process() -> None:
    rows = [PROMPT, PAIR, {"b": {"x", "y", "z"}, "a": None}]
    source = (
        "from tests.data.test_digest import PAIR, PROMPT; from aligner.data.digest import digest\n"
        "print(digest([PROMPT, PAIR, {'b': {'z', 'y', 'x'}, 'a': None}]))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(rows)


@pytest.mark.parametrize("text", ["\ud800", "\x00", "é", "e\u0301", "9" * 6000, '"', ""])
def test_any_text(text: str) -> None:
    assert digest([replace(PROMPT, text=text)]) != digest([replace(PROMPT, text=text + " ")])


def test_beyond_64_bits_and_mixed() -> None:
    assert digest([replace(PROMPT, tokens=(1, 2**70, 3))]) != digest([replace(PROMPT, tokens=(1, 2**70 + 1, 3))])
