"""Rules that score one response, and finding a rule by its name. A rule may be any function of this form:

    def rule(prompt: str, response: str, **fields) -> float

`fields` are the prompt's JSON fields (answer, ...) over the configured reward.kwargs; a rule that names the ones it
wants gets only these. It returns a finite number, and raises `Unparsable` where it cannot read the response.
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
"""Attribute of a rule that has a check of its own; see `checked_by`."""
SETTINGS = "settings"
"""Attribute of a rule whose data must not decide everything; see `checked_by`."""
Rule = TypeVar("Rule", bound=Callable[..., Any])


class Unparsable(Exception):
    """The response cannot be read, so it has no score (a score of 0 would say: read, and wrong)."""


def answer_after_marker(prompt: str, response: str, *, answer: Any, marker: str = "#") -> float:
    """1 if what follows the last `marker` is the answer, blanks aside, else 0; no marker is a wrong answer: 0."""
    _, found, given = response.rpartition(marker)
    return float(bool(found) and given.strip() == str(answer).strip())


def exact_match(prompt: str, response: str, *, answer: Any, ignore_case: bool = False) -> float:
    """1 if the whole response is the answer, blanks around it aside, else 0."""
    given, wanted = response.strip(), str(answer).strip()
    return float(given.casefold() == wanted.casefold() if ignore_case else given == wanted)


def regex_format(prompt: str, response: str, *, pattern: str) -> float:
    """1 if the whole response, blanks around it aside, matches the pattern (`.` is any character), else 0."""
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)


def checked_by(check: Callable[[Mapping[str, Any], float], str | None], *settings: str) -> Callable[[Rule], Rule]:
    """Give a rule a check of its own, made before the job starts, in a worker process on each rank that scores.

    Args:
        check: (configured kwargs, the row's time limit in seconds) -> what is wrong, or None. The answer begins with
            the setting, such as "kwargs.seconds=9 is ...".
        settings: arguments that only reward.kwargs may give; a row's field of that name is left out.
    """

    def mark(rule: Rule) -> Rule:
        setattr(rule, CHECK, check)
        setattr(rule, SETTINGS, frozenset(settings))
        return rule

    return mark


def load_rule(name: str) -> Callable[..., Any]:
    """The function called `package.module.function` or `path/to/file.py:function`.

    Raises:
        ValueError: it cannot be imported or called; the message names reward.rule.
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
        raise FileNotFoundError(f"there is no such file (looked at {path.absolute()})")
    sys.path.insert(0, str(path.parent.absolute()))  # as for a script: its neighbours can be imported
    name = f"rule_file_{path.stem}"  # not the bare stem: a file called json.py must not become everyone's json
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module
