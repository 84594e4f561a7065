"""Which notes of libraries stay off the console, and that no other does."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings

import pytest

from aligner.run.library_warnings import LOGGED, ignore_library_notes

NEWER = sys.version_info >= (3, 12)
"""The Python that Megatron-core 0.19 is installed for; 0.16 has none of its messages."""


@pytest.mark.parametrize(("name", "beginning"), LOGGED, ids=[name for name, _ in LOGGED])
def test_logged_notes_are_kept_off_and_other_messages_are_not(
    name: str, beginning: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        ignore_library_notes()
        ignore_library_notes()
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, logger=name)
    for attribute, value in (
        ("disabled", False),
        ("propagate", True),
    ):  # a library's own logging configuration may change both
        monkeypatch.setattr(logger, attribute, value)
    assert len(logger.filters) == 1
    logger.warning(f"{beginning} and so on")
    logger.warning("loss is not finite")
    assert caplog.messages == ["loss is not finite"]


@pytest.mark.parametrize(("name", "beginning"), LOGGED, ids=[name for name, _ in LOGGED])
def test_the_library_still_logs_them(name: str, beginning: str) -> None:
    expected = NEWER or name.startswith("torch")
    assert (beginning in inspect.getsource(importlib.import_module(name))) == expected
