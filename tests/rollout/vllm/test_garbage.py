"""What vLLM asks of the garbage collector while an engine starts leaves it as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from aligner.rollout.vllm.garbage import collector_kept, uncollected


class Node:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_or_hidden_inside_and_the_collector_is_back() -> None:
    def fail_inside() -> None:
        with uncollected(), collector_kept(torch.device("cpu")):
            assert gc.collect() == gc.collect(2) == 0 and node() is not None
            gc.unfreeze()
            assert gc.get_freeze_count() > frozen / 2  # some are freed as nothing refers to them any more
            gc.freeze()
            raise KeyError

    gc.freeze()
    node = weakref.ref(Node())
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError):
        fail_inside()
    assert gc.get_freeze_count() > frozen / 2 > 0
    gc.collect()
    assert node() is None


def test_on_cuda_garbage_is_collected_and_no_object_stays_hidden() -> None:
    gc.freeze()
    with collector_kept(torch.device("cuda")):
        node = weakref.ref(Node())
        gc.collect()
        assert node() is None
        gc.freeze()
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as `tests/conftest.py` has it
