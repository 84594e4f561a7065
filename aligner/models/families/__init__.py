"""The model families, one file each: every module of this package declares `FAMILY`, and is found without being named.

In: nothing. Out: `FAMILIES`, by config.json's "model_type".
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from aligner.models.family import Family


def _declared() -> Mapping[str, Family]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    families: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in modules}
    assert len(families) == len(modules), "two files declare one model_type"
    return MappingProxyType(families)


FAMILIES = _declared()
