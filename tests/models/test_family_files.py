"""Every file under aligner/models/families declares one family, and the tests know it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import transformers

import aligner.models.families as package
from aligner.models.families import FAMILIES
from tests.models import mutations


def test_every_file_is_a_family_of_transformers() -> None:
    files = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert len(files) == len(FAMILIES)
    for model_type, family in FAMILIES.items():
        assert family.model_type == model_type
        assert hasattr(transformers, family.architecture) and hasattr(transformers, family.classifier)


def test_the_fuzz_of_configurations_knows_every_family() -> None:
    assert set(mutations.FAMILIES) == set(FAMILIES)


def test_declarations_load_no_torch() -> None:
    code = "import sys, aligner.models.families; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30, cwd=root).returncode == 0
