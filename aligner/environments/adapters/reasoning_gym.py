"""Environments of kind `reasoning_gym`: a question of a data set of the package reasoning-gym, and its score of the answer.

The episode's seed draws the question, unless the row has a `seed`. environment.options are the data set's; a row's `options` come
first. The answer is what stands last between <answer> and </answer>, as the package reads it. A row with a prompt of its own
keeps it (as instructions), and the question follows; else it stands after the package's system prompt `default` (option
`system_prompt`: another of its names, a text of one's own, or null).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

GLOBAL_RANDOM = True


def make(host: Host) -> Callable[[], ReasoningGym]:
    """See the package."""
    package = host.load("reasoning_gym", "environment.kind=reasoning_gym; environment.target")
    names = host.load("reasoning_gym.factory").DATASETS
    if host.target not in names:
        some = ", ".join(sorted(names)[:8])
        raise host.Unusable(
            f"environment.target={host.target} is no data set of reasoning-gym; use {some}, ... ({len(names)})"
        )
    utilities = host.load("reasoning_gym.utils")
    options = dict(host.options)
    prompt = options.pop("system_prompt", "default")
    system = utilities.SYSTEM_PROMPTS.get(prompt, prompt)
    try:
        package.create_dataset(host.target, seed=0, size=1, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise host.Unusable(f"environment.options do not fit reasoning-gym's {host.target}: {error}") from None

    def create(seed: int, more: dict[str, Any]) -> Any:
        return package.create_dataset(host.target, **{"seed": seed, "size": 1, **options, **more})

    return lambda: ReasoningGym(create, utilities.extract_answer, system)


class ReasoningGym:
    """One episode: one question, one answer."""

    def __init__(
        self, create: Callable[[int, dict[str, Any]], Any], extract: Callable[[str], Any], system: str | None
    ) -> None:
        self._create, self._extract, self._system = create, extract, system

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        self._questions = self._create(int(row.get("seed", seed)) % 2**31, row.get("options") or {})
        self._entry = self._questions[0]
        messages = [{"role": "user", "content": self._entry["question"]}]
        if self._system and not (row.get("messages") or row.get("prompt")):
            messages.insert(0, {"role": "system", "content": self._system.strip()})
        return {"messages": messages}

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        answer = self._extract(text)
        score = self._questions.score_answer(answer, self._entry)
        return {"messages": [], "done": True, "reward": score, "metrics": {"answered": float(answer is not None)}}

    def finish(self) -> dict[str, Any]:
        return {"reward": None}

    def close(self) -> None:
        pass
