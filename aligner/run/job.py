"""`Job`: everything known before the world starts (data; `aligner.run.prepare` makes it, `aligner.run.loop` runs it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aligner.check.job import Checked
from aligner.checkpoint.lease import Lease
from aligner.config.schema import Config
from aligner.config.secrets import Mask
from aligner.health.startup import Startup


@dataclass(frozen=True)
class Job:
    """Everything known before the world starts."""

    config: Config
    loop: Callable[..., Iterator[Any]]
    settings: Any
    """The loop's own settings, `cfg` in its signature."""
    roles: list[str]
    checked: Checked
    inputs: dict[str, str] = field(default_factory=dict)
    """What is read besides the settings, as digests (see `inputs_of`); on the first rank."""
    lease: Lease | None = None
    """The first rank's hold of run_dir."""
    mask: Mask = field(default_factory=Mask)
    """The secrets that must not be shown or saved."""
    startup: Startup = field(default_factory=Startup)
    """What this process has done since it began."""
