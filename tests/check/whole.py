"""A configuration checked as a job is: models first, then the data, then both."""

from __future__ import annotations

from aligner.check.job import Checked, check_job, check_models
from aligner.check.summary import job_summary
from aligner.config.schema import Config
from aligner.data.sets import read_sets
from aligner.run.job import Job


def check(config: Config, roles: list[str], world_size: int) -> Checked:
    """What the checks have read; ValueError for the first mistake."""
    models = check_models(config, roles, world_size)
    return check_job(config, roles, models, read_sets(config.data, models.tokenizer))


def said_of(job: Job, world_size: int) -> str:
    """What mode=check prints of a job."""
    return job_summary(job.config, job.roles, job.checked, world_size)
