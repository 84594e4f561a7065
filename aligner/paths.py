"""Paths that people write, in settings and on command lines: ~ and environment variables (no torch)."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

SETTINGS = (
    "model.path", "data.path", "data.eval_path", "data.chat_template", "critic.path", "reward_model.path", "algorithm.out",
    "run_dir",
)  # fmt: skip
"""Settings that are paths; the files of rules are too."""
NAMED = ("reward.components", "models", "data.sources")
"""Sections of names of the user's own, whose entries have paths."""
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
IN_BRACES = re.compile(r"\$\{([A-Za-z_]\w*)\}")
TILDE = re.compile(r"(\+{0,2}[\w./@]+)=(~.*)", re.DOTALL)


def expanded(path: str, setting: str) -> str:
    """`path` with ~, ~user, $NAME and ${NAME} replaced; a file that is there under such a name is left as it is.

    Args:
        setting: where it was written, for the errors.

    Raises:
        ValueError: a variable that has no value, or a user that there is not.
    """

    names = [match[1] or match[2] for match in VARIABLE.finditer(path)]
    unset = [name for name in names if not os.environ.get(name)]
    if unset and (os.path.lexists(path) or ("$" in os.path.dirname(path) and os.path.isdir(os.path.dirname(path)))):
        return path
    if unset:
        raise ValueError(
            f"{setting}={path}: the environment variable {unset[0]} has no value; set it, or write it out."
        )
    text = VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    expansion = os.path.expanduser(text) if text.startswith("~") else text
    if expansion.startswith("~"):
        user = expansion.split("/")[0]
        raise ValueError(f"{setting}={path}: there is no home folder for {user}; write it out, or ./{user} for a file.")
    return expansion


def expanded_rule(rule: str, setting: str) -> str:
    """`path/to/file.py:function` likewise; `package.module.function` as it is."""
    path, colon, function = rule.rpartition(":")
    return f"{expanded(path, setting)}{colon}{function}" if path.endswith(".py") else rule


def path_option(text: str) -> Path:
    """A path on a command line, for argparse."""
    try:
        return Path(expanded(text, "PATH"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("PATH=")) from None


def quoted_tilde(override: str) -> str:
    """KEY=~/folder as Hydra takes it, whose grammar has no ~ in values."""
    match = TILDE.fullmatch(override)
    if match is None:
        return override
    escaped = match[2].replace("'", "\\'")
    return f"{match[1]}='{escaped}'"


def expand_composed(config: DictConfig) -> None:
    """Replace ~ and variables in every setting that is a path, as far as nothing in it is OmegaConf's to resolve, such
    as "${seed}" and "${oc.env:NAME}".

    Raises:
        ValueError: as `expanded`.
    """
    for key, by in _paths(*(_child(config, name) for name in NAMED)):
        value = _child(config, key)
        if not isinstance(value, str) or value == "???":
            continue
        if "${" in value:  # ${NAME} is a setting's value where there is such a setting
            value = IN_BRACES.sub(lambda match: match[0] if match[1] in config else f"${match[1]}", value)
        OmegaConf.update(config, key, value if "${" in value else by(value, key), force_add=True)


def expand_values(values: dict[str, Any]) -> None:
    """The same in plain nested dicts, after everything was resolved."""
    for key, by in _paths(*(_value(values, name) for name in NAMED)):
        *parents, name = key.split(".")
        node: Any = values
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(name), str):
            node[name] = by(node[name], key)
        elif isinstance(node, dict) and isinstance(node.get(name), list):  # several files
            node[name] = [by(path, key) if isinstance(path, str) else path for path in node[name]]


def _value(values: Any, key: str) -> Any:
    """The value of a dotted key in nested dicts; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _paths(components: Any, models: Any, sources: Any) -> Iterator[tuple[str, Callable[[str, str], str]]]:
    """(setting, what expands it)."""
    yield from ((key, expanded) for key in SETTINGS)
    yield "environment.python", expanded
    yield "environment.agent.command", expanded
    yield "reward.rule", expanded_rule
    yield "environment.target", expanded_rule
    if isinstance(components, Mapping | DictConfig):
        yield from ((f"reward.components.{name}.rule", expanded_rule) for name in components)
    if isinstance(models, Mapping | DictConfig):
        yield from ((f"models.{name}.path", expanded) for name in models)
    if isinstance(sources, Mapping | DictConfig):
        yield from ((f"data.sources.{name}.path", expanded) for name in sources)


def _child(config: DictConfig, key: str) -> Any:
    """The value as it is written, nothing resolved; None where there is none."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
            return None
        node = node._get_node(part, validate_access=False)
    return node if node is None or isinstance(node, DictConfig) else node._value()
