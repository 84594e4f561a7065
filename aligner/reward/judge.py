"""A language model as a judge: the question of a row, and the score in its answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from typing import Any

from aligner.reward.config import JudgeConfig
from aligner.reward.worker import DETAIL_CHARACTERS, Score, Status


class Judge:
    """Builds chat completion requests (the OpenAI form, which vLLM serves too) and reads scores from the answers.

    A response may try to talk the judge into a score; the prompt should say what is to be judged and where it ends.
    """

    def __init__(self, config: JudgeConfig, where: str) -> None:
        """
        Raises:
            ValueError: no model, a prompt that does not show the response, a pattern without exactly one group.
        """
        self.config = config
        if not config.model:
            raise ValueError(f"{where}.judge.model has no value; give the model's name at {where}.url.")
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(config.prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"{where}.judge.prompt: {error}; write {{{{ and }}}} for braces.") from None
        if "response" not in names:
            raise ValueError(f"{where}.judge.prompt does not show the response; put {{response}} where it belongs.")
        if not all(name.isidentifier() for name in names):
            raise ValueError(
                f"{where}.judge.prompt: only names may stand in braces, such as {{response}} or {{answer}}."
            )
        self.fields = frozenset(names - {"prompt", "response"})
        """The rows' fields that the prompt shows."""
        try:
            self.pattern = re.compile(config.pattern)
        except re.error as error:
            raise ValueError(f"{where}.judge.pattern={config.pattern} is no regular expression: {error}.") from None
        if self.pattern.groups != 1:
            raise ValueError(f"{where}.judge.pattern={config.pattern} must have one group: the score.")

    def request(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The body for one row. Raises KeyError for a field that the row lacks."""
        values = {**item["fields"], "prompt": item["prompt"], "response": item["response"]}
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": self.config.prompt.format_map(values)}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }

    def read(self, answer: Any) -> Score:
        """The last match of the pattern, a finite number; unparsable where there is none."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            return Score(math.nan, Status.FAILED, 0.0, f"the answer is no chat completion: {str(answer)[:120]}")
        found = self.pattern.findall(text)
        try:
            value = float(found[-1])
        except (IndexError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            said = f"no score in the judge's answer: {text}"
            return Score(math.nan, Status.UNPARSABLE, 0.0, said[:DETAIL_CHARACTERS])
        return Score(value, Status.OK, 0.0)
