"""`--help`: every group and field with its meaning, read from the configuration dataclasses' own docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path
from typing import Any

from aligner.bounds import dataclass_in, hints_with_bounds, shown_bounds
from aligner.config.device_defaults import default_note
from aligner.config.models import SETTINGS
from aligner.config.schema import CONF, Config
from aligner.spmd.role_table import USUAL

USAGE = """usage: torchrun --nproc-per-node N -m aligner.main [--config-name NAME] [--config-dir DIR] [--cfg job] [--help] KEY=VALUE ...

  --config-name NAME   top-level configuration in the configuration folder (default: train)
  --config-dir DIR     configuration folder (default: conf/)
  --cfg job            print the whole composed configuration and leave
  --help               this text

Groups (choose one with GROUP=NAME):"""


def help_text(folder: Path = CONF) -> str:
    """The whole help."""
    lines = [USAGE]
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines.append(f"  {group.name:<11} {', '.join(sorted(path.stem for path in group.glob('*.yaml')))}")
    if (folder / "algorithm").is_dir():
        lines += ["", "Algorithms (algorithm=NAME), and what differs from their papers:"]
        for path in sorted((folder / "algorithm").glob("*.yaml")):
            lines.append(f"  {path.stem}")
            lines += textwrap.wrap(comment_of(path), 108, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += [
        "",
        "Fields (KEY=VALUE; models and placement take new names, and + adds a key to algorithm, reward.kwargs,",
        "reward.components or data.chat_template_kwargs):",
    ]
    lines += _fields(Config(), "")
    return "\n".join(lines)


def comment_of(path: Path) -> str:
    """The comment that a YAML file begins with, without Hydra's own."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines if "@package" not in line)


def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones among them."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_docs(base)
    return docs


def _own_docs(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(text, str):
            docs[before.target.id] = " ".join(text.split())
    return docs


def _fields(made: Any, prefix: str) -> list[str]:
    """The fields of a dataclass with the values that they have in `made`."""
    kind = type(made)
    docs = field_docs(kind)
    hints = hints_with_bounds(kind)
    lines: list[str] = []
    for entry in dataclasses.fields(kind):
        name, value = f"{prefix}{entry.name}", getattr(made, entry.name)
        inner = dataclass_in(hints[entry.name])
        if name == "placement":
            lines += [f"  {name}: {docs[name]}"]
            for role, layout in value.items():
                lines += [f"  {name}.{role}: {USUAL[role].doc}", *_fields(layout, f"{name}.{role}.")]
            lines += ["  placement.NAME: the same of models.NAME; without it ranks=policy, an engine's ranks=rollout"]
        elif name == "models":
            lines += [f"  {name}: {docs[name]}", *_models()]
        elif inner is not None:
            lines += [
                f"  {name}: {docs.get(entry.name, '')}",
                *_fields(inner() if value is None else value, f"{name}."),
            ]
        else:
            bounds, note = shown_bounds(hints[entry.name]), default_note(prefix.rstrip("."), entry.name)
            lines.append(f"  {name}={'null' if value is None else value}{note}" + f"  [{bounds}]" * bool(bounds))
            lines += textwrap.wrap(docs[entry.name], 108, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def _models() -> list[str]:
    """Each kind of further model: the fields that it shares with a section, by name, and its own."""
    lines: list[str] = []
    for kind, settings in SETTINGS.items():
        base = settings.__mro__[1]
        section = next(
            entry.name
            for entry in dataclasses.fields(Config)
            if dataclass_in(hints_with_bounds(Config)[entry.name]) is base
        )
        lines += textwrap.wrap(
            f"models.NAME.kind={kind}: {_one_line(settings)}", 118, initial_indent="  ", subsequent_indent=" " * 8
        )
        lines.append(f"        The fields of {section}.*, and:")
        docs, own = field_docs(settings), [name for name in settings.__annotations__ if name != "kind"]
        for name in own:
            lines.append(f"  models.NAME.{name}={settings.__dataclass_fields__[name].default}")  # type: ignore[attr-defined]
            lines += textwrap.wrap(docs[name], 108, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def _one_line(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())
