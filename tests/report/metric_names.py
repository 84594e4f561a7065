"""Which metrics of a run nobody has declared: what the tests that run whole jobs ask of their rows."""

from __future__ import annotations

from collections.abc import Iterable

from aligner.report.metric_registry import OWN, metric_of


def undeclared(names: Iterable[str]) -> list[str]:
    """Names without a declaration in `aligner.report.metric_registry`; a family for users' loops declares nothing."""
    return [name for name in names if not _declared(name)]


def _declared(name: str) -> bool:
    metric = metric_of(name)
    if metric is None or f"{{{OWN}}}" in metric.name:
        return False
    return metric.name != "critic_{metric}" or _declared(name.removeprefix("critic_"))
