"""LLM as a judge: build the chat completion request for a row, and parse the score from the answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from typing import Any

from aligner.reward.config import JudgeConfig
from aligner.reward.worker import DETAIL_CHARACTERS, Score, Status


class Judge:
    """Builds OpenAI-compatible chat completion requests and parses scores from the answers.

    A response may contain a prompt injection; the judge's prompt should mark clearly where the response begins and ends.
    """

    def __init__(self, config: JudgeConfig, where: str) -> None:
        """
        Raises:
            ValueError: no model, a prompt without {response}, or a pattern without exactly one group.
        """
        self.config = config
        if not config.model:
            raise ValueError(f"{where}.judge.model is not set; give the model's name at {where}.url.")
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(config.prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"{where}.judge.prompt: {error}; write {{{{ and }}}} for braces.") from None
        if "response" not in names:
            raise ValueError(f"{where}.judge.prompt does not contain the response; put {{response}} into it.")
        if not all(name.isidentifier() for name in names):
            raise ValueError(
                f"{where}.judge.prompt: only names are allowed in braces, such as {{response}} or {{answer}}."
            )
        self.fields = frozenset(names - {"prompt", "response"})
        """The rows' fields that the prompt uses."""
        try:
            self.pattern = re.compile(config.pattern)
        except re.error as error:
            raise ValueError(f"{where}.judge.pattern={config.pattern} is not a regular expression: {error}.") from None
        if self.pattern.groups != 1:
            raise ValueError(f"{where}.judge.pattern={config.pattern} must have one group: the score.")

    def request(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The request body for one row. Raises KeyError for a field that the row lacks."""
        values = {**item["fields"], "prompt": item["prompt"], "response": item["response"]}
        return {
            "model": self.config.model,
            "messages": [{"role": "user", "content": self.config.prompt.format_map(values)}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }

    def read(self, answer: Any) -> Score:
        """The score from the last match of the pattern; UNPARSABLE if there is no finite number."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            return Score(math.nan, Status.FAILED, 0.0, f"the answer is not a chat completion: {str(answer)[:120]}")
        matches = self.pattern.findall(text)
        try:
            value = float(matches[-1])
        except (IndexError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            detail = f"no score in the judge's answer: {text}"
            return Score(math.nan, Status.UNPARSABLE, 0.0, detail[:DETAIL_CHARACTERS])
        return Score(value, Status.OK, 0.0)
