from __future__ import annotations

from typing import Any

import pytest

from aligner.environments import worker
from aligner.environments.adapters import steps
from tests.environments.adapters.in_process import host

SEEN = [{"role": "user", "content": "seen"}]
FORMS: dict[str, tuple[list[dict[str, Any]], float | None, bool, dict[str, float]]] = {
    "text": (SEEN, None, False, {}),
    "nothing": ([], None, False, {}),
    "three": (SEEN, 1, True, {}),
    "four": (SEEN, 0.5, False, {"x": 2}),
    "gymnasium": ([{"role": "user", "content": '{"board": [1, 2]}'}], 0.5, True, {}),
    "fields": (SEEN, 2.0, True, {"x": 1}),
    "thing": (SEEN, 0.25, True, {}),
    "calls": ([{"role": "user", "content": "[{'name': 'f'}]"}], None, False, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_may_return(form: str) -> None:
    episode = steps.make(host(":Forms"))()
    opened = episode.open({"q": 1}, 0)
    assert [message["role"] for message in opened["messages"]] == ["system", "user"]
    assert opened["tools"][0]["function"]["name"] == "f"
    turn = episode.step(form, [{"name": "f"}])
    assert (turn["messages"], turn["reward"], turn["done"], turn["metrics"]) == FORMS[form]
    assert episode.finish() == {"reward": 3.0}
    episode.close()


def test_gymnasium_reset() -> None:
    opened = steps.make(host(":Gymnasium"))().open({"q": 1}, 5)
    assert opened["messages"] == [{"role": "user", "content": "5 {'q': 1}"}]


def test_options_and_seed() -> None:
    make = steps.make(host(":Guess", options={"high": 4}))
    opened = [make().open({}, seed)["messages"][0]["content"] for seed in (0, 1)]
    assert opened == ["Guess a number from 1 to 4."] * 2
    with pytest.raises(worker.Unusable, match=r"environment\.options do not fit"):
        steps.make(host(":Guess", options={"low": 4}))
    with pytest.raises(worker.Unusable, match=r"has no step\(\)"):
        steps.make(host(":Counter"))


@pytest.mark.parametrize(
    ("target", "kind"),
    {
        ":Guess": "steps",
        ":Counter": "tools",
        ":add": "tools",
        "interpreter": "tools",
        "http": "tools",
        "http://127.0.0.1:1": "openenv",
    }.items(),
)
def test_kinds_are_found(target: str, kind: str) -> None:
    assert worker.kind_of(host(target)) == kind
    with pytest.raises(worker.Unusable, match=r"set environment\.kind"):
        worker.kind_of(host("TicTacToe-v0"))
