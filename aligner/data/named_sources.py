"""The training sources of a job: data.path (or data.task) alone, or each entry of data.sources with its own settings."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aligner.data.config import DataConfig
from aligner.data.mixture_config import SourceConfig

ALONE = "data"
"""The name of the one source of a job without data.sources."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class NamedSource:
    """One training source."""

    name: str
    data: DataConfig
    """The settings that hold for its rows."""
    setting: str = "data.path"
    """The setting of its path."""
    weight: float = 1.0
    """Its share of the rows, relative to the others'."""


def named_sources(data: DataConfig) -> list[NamedSource]:
    """The sources in the order of the configuration.

    Raises:
        ValueError: no source or two kinds of them, an unknown key, or a value that is not possible.
    """
    given = [name for name in ("path", "task", "sources") if getattr(data, name)]
    if not given:
        raise ValueError(
            "data.path is not set; give a file, a folder or a glob of them, several sources as data.sources.NAME.path, or "
            "choose a generated task: data=column_addition."
        )
    if "sources" not in given:
        return [NamedSource(ALONE, data)]
    if len(given) > 1:
        raise ValueError(
            f"data.sources={', '.join(data.sources)} and data.{given[0]} are both set; make data.{given[0]} one of the sources, "
            f"or set it to null."
        )
    return [_named(name, values, data) for name, values in data.sources.items()]


def _named(name: str, values: Any, data: DataConfig) -> NamedSource:
    where = f"data.sources.{name}"
    if not NAME.fullmatch(str(name)):
        raise ValueError(f"{where}: a source's name is a word of letters, digits and _.")
    source = _read(values, where)
    if not source.path:
        raise ValueError(f"{where}.path is not set; give its rows' file, folder or glob.")
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise ValueError(
            f"{where}.weight={source.weight} must be more than 0; leave the source out to draw none of it."
        )
    own = {
        entry.name: getattr(source, entry.name)
        for entry in dataclasses.fields(source)
        if entry.name != "weight" and getattr(source, entry.name) is not None
    }
    own["chat_template_kwargs"] = {**data.chat_template_kwargs, **own.get("chat_template_kwargs", {})}
    try:
        merged = replace(data, sources={}, **own)
        merged.check()
    except ValueError as error:
        names = "|".join(own)
        raise ValueError(re.sub(rf"\bdata\.({names})\b", rf"{where}.\1", str(error))) from None
    return NamedSource(name, merged, f"{where}.path", source.weight)


def _read(values: Any, where: str) -> SourceConfig:
    """Plain values -> settings, every type checked: below data.sources the schema of the configuration ends."""
    known = [entry.name for entry in dataclasses.fields(SourceConfig)]
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}={values} is not possible; set its keys, such as {where}.path=FILE ({', '.join(known)})."
        )
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"there is no setting {where}.{unknown[0]}; {where} has {', '.join(known)}.")
    usual = OmegaConf.structured(SourceConfig)
    OmegaConf.set_readonly(usual, False)
    try:
        typed: Any = OmegaConf.to_container(OmegaConf.merge(usual, values))
    except OmegaConfBaseException as error:
        text = str(error.msg if error.msg is not None else error).splitlines()[0].rstrip(".")
        raise ValueError(f"{where}.{error.full_key}: {text}.") from None
    return SourceConfig(**typed)
