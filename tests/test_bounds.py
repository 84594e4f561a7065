"""Bounds beside the fields: what each allows, what an error and `--help` say, and that one function finds them all."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf

from aligner.bounds import (
    AtLeast,
    AtMost,
    Between,
    Bound,
    Finite,
    LessThan,
    MoreThan,
    NotEmpty,
    OneOf,
    bounds_of,
    check_settings,
    dataclass_in,
    hints_with_bounds,
    shown_bounds,
)
from aligner.config.schema import Config
from aligner.data.column_addition import ColumnAddition


@dataclass(frozen=True)
class Inner:
    """A section of settings."""

    action: Annotated[str, OneOf("off", "warn")] = "warn"
    share: Annotated[float, MoreThan(0), AtMost(1)] = 0.5
    decay: Annotated[float, AtLeast(0), LessThan(1)] = 0.9
    seconds: Annotated[float, Finite(), AtLeast(2)] = 3.0


@dataclass(frozen=True)
class Outer:
    """A whole configuration."""

    name: Annotated[str, NotEmpty("first")] = "x"
    steps: Annotated[int, AtLeast(1)] = 10
    every: Annotated[int | None, AtLeast(0, "0: never")] = None
    kind: Annotated[str | None, OneOf("a", "b")] = None
    ids: Annotated[tuple[int, ...] | None, AtLeast(0)] = None
    low: int = 0
    high: int = 1
    inner: Inner = field(default_factory=Inner)
    task: Any = None

    def check(self) -> None:
        """A relation."""
        if self.low > self.high:
            raise ValueError(f"low={self.low} is more than high={self.high}; swap them.")


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (AtLeast(2), [2, 3.5, math.inf], [1.99, -math.inf, math.nan]),
        (MoreThan(0), [1e-9, math.inf], [0, -1, math.nan]),
        (AtMost(1), [1, -math.inf], [1.01, math.nan]),
        (LessThan(1), [0.999, -5], [1, math.nan]),
        (Between(0, 2), [0, 1.5, 2], [-0.1, 2.1, math.nan]),
        (Finite(), [0, -1e300], [math.inf, math.nan]),
        (OneOf("off", "on"), ["off", "on"], ["ON", "", False]),
        (NotEmpty("x"), ["y"], ["", "  "]),
    ],
)
def test_what_a_bound_allows(bound: Bound, inside: list[Any], outside: list[Any]) -> None:
    assert all(bound.allows(value) for value in inside)
    assert not any(bound.allows(value) for value in outside), "a NaN is outside every bound"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Outer(name=" "), "name has no value; give one, such as name=first."),
        (Outer(steps=0), "steps=0 must be at least 1."),
        (Outer(every=-1), "every=-1 must be at least 0 (0: never), or null."),
        (Outer(kind="c"), "kind=c is unknown; use a, b, or null."),
        (Outer(ids=(3, -1)), "each item of ids=[3, -1] must be at least 0, or null."),
        (Outer(inner=Inner(action="stop")), "inner.action=stop is unknown; use off, warn."),
        (Outer(inner=Inner(action="False")), 'inner.action=False is unknown; use off, warn (in YAML, quote it: action: "off").'),
        (Outer(inner=Inner(share=0.0)), "inner.share=0.0 must be more than 0 and at most 1."),
        (Outer(inner=Inner(share=1.5)), "inner.share=1.5 must be more than 0 and at most 1."),
        (Outer(inner=Inner(decay=1.0)), "inner.decay=1.0 must be at least 0 and less than 1."),
        (Outer(inner=Inner(seconds=math.inf)), "inner.seconds=inf must be finite and at least 2."),
        (Outer(low=2), "low=2 is more than high=1; swap them."),
        (Outer(low=2, inner=Inner(share=2.0)), "inner.share=2.0 must be more than 0 and at most 1."),
    ],
)  # fmt: skip
def test_an_error_names_the_setting_and_the_values_that_work(settings: Outer, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_settings(settings)


def test_a_place_is_named_and_what_is_inside_passes() -> None:
    check_settings(Outer(), "algorithm")
    check_settings(Outer(every=0, kind="a", ids=(0, 7)))
    with pytest.raises(ValueError, match=r"^algorithm\.inner\.share=2"):
        check_settings(Outer(inner=Inner(share=2)), "algorithm")


def test_an_object_in_a_field_of_any_type_is_no_section() -> None:
    check_settings(Outer(task=Inner(share=9.0)))
    check_settings(Outer(task=ColumnAddition()))


def test_what_help_prints() -> None:
    hints = hints_with_bounds(Outer)
    assert shown_bounds(hints["every"]) == "at least 0 (0: never), or null"
    assert shown_bounds(hints["kind"]) == "one of a, b, or null"
    assert shown_bounds(hints["low"]) == shown_bounds(hints["inner"]) == ""
    assert [bound.text for bound in bounds_of(hints_with_bounds(Inner)["share"])] == ["more than 0", "at most 1"]


def test_omegaconf_takes_annotated_fields() -> None:
    """A loop's settings are merged over their dataclass: types are converted and checked as without bounds."""
    merged: Any = OmegaConf.merge(OmegaConf.structured(Outer), {"steps": "7"})
    assert (merged.steps, merged.every) == (7, None)


def test_every_default_of_a_job_is_inside_its_bounds() -> None:
    """And every number or word with a bound says so in `--help`, which reads the same types."""
    config = Config()
    check_settings(dataclasses.replace(config, model=dataclasses.replace(config.model, path="DIR")))

    def bounded(kind: type) -> int:
        hints = hints_with_bounds(kind)
        inner = [dataclass_in(hint) for hint in hints.values()]
        return sum(bool(bounds_of(hint)) for hint in hints.values()) + sum(bounded(one) for one in inner if one)

    assert bounded(Config) >= 90, "a declaration of bounds was lost"


def test_it_loads_no_torch() -> None:
    code = "import sys, aligner.bounds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
