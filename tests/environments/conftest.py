"""Fixtures of whole jobs on environments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Torchrun
from tests.environments.short_job import ShortJob, short_job_in


@pytest.fixture
def short_job(torchrun: Torchrun, tmp_path: Path) -> ShortJob:
    """short_job(words, rows, *overrides): the metrics of a short GRPO job."""
    return short_job_in(tmp_path, torchrun)
