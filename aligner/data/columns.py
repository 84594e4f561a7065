"""data.columns: which column of a row each key of ours is, also nested ones ("a.b", "messages[0].content")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aligner.data.json_text import parsed

STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
"""One step of a column's path: a key, or a number in brackets."""


class Columns:
    """Renames the columns of rows."""

    def __init__(self, columns: Mapping[str, str], setting: str = "data.columns") -> None:
        """
        Args:
            columns: key of ours -> column, "question", or a path into one.
            setting: where they were written, for errors.

        Raises:
            ValueError: no mapping of names, or a path that cannot be read.
        """
        if not isinstance(columns, Mapping) or not all(isinstance(path, str) for path in columns.values()):
            raise ValueError(
                f"{setting}={columns} must name columns by our keys: {{prompt: question, answer: answer}}."
            )
        self.columns, self._setting = dict(columns), setting
        self._paths = {key: _steps(path, f"{setting}.{key}") for key, path in self.columns.items()}
        self._moved = {path for path in self.columns.values()} - set(self.columns)

    def renamed(self, row: dict[str, Any], label: str) -> dict[str, Any]:
        """The row with our keys. A column that got another name loses its own; the others stay. A path leads into JSON text
        too, and through null to null.

        Raises:
            ValueError: a column that the row does not have; the text begins with `label`.
        """
        picked = {key: self._value(row, key, label) for key in self.columns}
        return {name: value for name, value in row.items() if name not in self._moved} | picked

    def _value(self, row: dict[str, Any], key: str, label: str) -> Any:
        path = self.columns[key]
        if path in row:  # a name with dots in it comes first
            return row[path]
        value: Any = row
        walked = ""
        for step in self._paths[key]:
            if value is None:
                return None
            value = parsed(value)
            inside = isinstance(value, dict) and step in value if isinstance(step, str) else _has_item(value, step)
            if not inside:
                raise ValueError(
                    f"{label}: there is no {path!r} ({self._setting}.{key}={path}): {_lacks(value, walked, step)}."
                )
            value = value[step]
            walked += f"[{step}]" if isinstance(step, int) else f".{step}" * bool(walked) or step
        return value


def _steps(path: str, setting: str) -> list[str | int]:
    """ "messages[0].content" -> ["messages", 0, "content"]."""
    steps: list[str | int] = []
    place = 0
    while place < len(path):
        match = STEP.match(path, place)
        if match is None:
            break
        steps.append(match[1] if match[1] is not None else int(match[2]))
        place = match.end()
    if place < len(path) or not steps or isinstance(steps[0], int):
        raise ValueError(f"{setting}={path} is no column; write a name, a.b, or messages[0].content.")
    return steps


def _has_item(value: Any, index: int) -> bool:
    return isinstance(value, list) and -len(value) <= index < len(value)


def _lacks(value: Any, walked: str, step: str | int) -> str:
    place = repr(walked) if walked else "the row"
    if isinstance(value, dict):
        return f"{place} has {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"{place} is a list of {len(value)}"
    return f"{place} is {type(value).__name__}, without {'items' if isinstance(step, int) else 'keys'}"
