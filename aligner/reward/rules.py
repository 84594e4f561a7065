"""Built-in reward rules, and loading a rule by name. A rule is any function of this form:

    def rule(prompt: str, response: str, **fields) -> float

`fields` are reward.kwargs updated with the prompt's JSON fields (answer, ...); a rule without **fields gets only its named
arguments. It returns a finite number, and raises `Unparsable` if it cannot parse the response.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

CHECK = "check_settings"
"""Attribute of a rule with a settings check; see `checked_by`."""
SETTINGS = "settings"
"""Attribute of a rule with arguments that rows cannot set; see `checked_by`."""
Rule = TypeVar("Rule", bound=Callable[..., Any])


class Unparsable(Exception):
    """The response cannot be parsed, so the row gets no reward (0 would mean: parsed, and wrong)."""


def answer_after_marker(prompt: str, response: str, *, answer: Any, marker: str = "#") -> float:
    """1 if the text after the last `marker` equals the answer (whitespace stripped), else 0; 0 without a marker."""
    _, separator, after = response.rpartition(marker)
    return float(bool(separator) and after.strip() == str(answer).strip())


def exact_match(prompt: str, response: str, *, answer: Any, ignore_case: bool = False) -> float:
    """1 if the whole response equals the answer (whitespace stripped), else 0."""
    stripped, expected = response.strip(), str(answer).strip()
    return float(stripped.casefold() == expected.casefold() if ignore_case else stripped == expected)


def regex_format(prompt: str, response: str, *, pattern: str) -> float:
    """1 if the whole response (whitespace stripped) matches the pattern (`.` matches any character), else 0."""
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)


def checked_by(check: Callable[[Mapping[str, Any], float], str | None], *settings: str) -> Callable[[Rule], Rule]:
    """Decorator that gives a rule a check of its settings, run before the job starts in a worker process on each reward rank.

    Args:
        check: (configured kwargs, time limit per row in seconds) -> error message or None. The message begins with the
            setting, such as "kwargs.seconds=9 is ...".
        settings: arguments that only reward.kwargs can set; a row's field of that name is ignored.
    """

    def mark(rule: Rule) -> Rule:
        setattr(rule, CHECK, check)
        setattr(rule, SETTINGS, frozenset(settings))
        return rule

    return mark


def load_rule(name: str) -> Callable[..., Any]:
    """Load the function `package.module.function` or `path/to/file.py:function`.

    Raises:
        ValueError: it cannot be imported or is not callable; the message names reward.rule.
    """
    target, _, function = name.rpartition(":" if ":" in name else ".")
    if not target or not function:
        raise ValueError(f"reward.rule={name!r} is neither package.module.function nor path/to/file.py:function.")
    try:
        module = _load_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"reward.rule={name!r}: {target} cannot be imported: {reason}") from error
    rule = getattr(module, function, None)
    if rule is None:
        raise ValueError(f"reward.rule={name!r}: {target} has no {function!r}.")
    if not callable(rule):
        raise ValueError(f"reward.rule={name!r} is a {type(rule).__name__}, not a function.")
    return rule


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    sys.path.insert(0, str(path.parent.absolute()))  # as for a script: modules beside it can be imported
    name = f"rule_file_{path.stem}"  # not the bare stem: a file called json.py must not shadow the module json
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module
