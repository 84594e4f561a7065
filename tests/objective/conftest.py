"""TRL as an independent reference, imported once and only by the tests that compare with it."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

if TYPE_CHECKING:
    from tests.objective.trl_reference import Trl


@pytest.fixture(scope="session")
def trl() -> Trl:
    """TRL's methods, callable on tensors."""
    from tests.objective.trl_reference import Trl

    # TRL sets variables that the jobs of later tests would inherit; what is set in here goes again.
    with warnings.catch_warnings(), patch.dict(os.environ):
        # What TRL says of its ORPO and CPO whenever they are imported.
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        # Nothing here generates, and vLLM takes longer to import than all of TRL.
        found = importlib.import_module("trl.import_utils")
        with patch.object(found, "is_vllm_available", lambda *_, **__: False):
            return Trl()
