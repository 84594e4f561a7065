"""A process that made an engine, wrote its weights and generated is as it was, and silent."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from aligner.rollout.config import Sampling
from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.subworld import SubWorld
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny

GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
DRAWN = Sampling(temperature=0.7, max_tokens=24, stop_token_ids=())


def test_the_process_is_left_as_it_was(
    start: Callable[..., VllmEngine], models: dict[str, tuple[Any, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand(()))]

    def seed() -> None:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    undisturbed = [draw() for _ in range(4)]
    environment, default, threads = dict(os.environ), dist.group.WORLD, torch.get_num_threads()
    processors = os.sched_getaffinity(0)
    frozen, collect = gc.get_freeze_count(), gc.collect
    setter, precision = torch.set_num_threads, torch.get_float32_matmul_precision()
    seed()
    drawn = [draw()]
    engine = start("qwen2")
    drawn.append(draw())
    tiny.write(EngineWeights(engine), models["qwen2"][0])
    drawn.append(draw())
    engine.generate(tiny.prompts(3), [1, 2, 3], DRAWN)
    drawn.append(draw())
    assert drawn == undisturbed
    assert dict(os.environ) == environment
    assert dist.group.WORLD is default
    assert dist.get_rank() == 0
    assert os.sched_getaffinity(0) == processors
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, setter)
    assert torch.get_float32_matmul_precision() == precision
    assert gc.get_freeze_count() <= frozen and gc.collect is collect
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_no_generation_before_the_first_weights(start: Callable[..., VllmEngine]) -> None:
    engine = start("qwen2")
    with pytest.raises(RuntimeError, match=r"call policy\.reshard_to\(rollout\) first"):
        engine.generate([[5]], [0], GREEDY)


def test_two_engines_of_a_process_do_not_disturb_each_other(
    start: Callable[..., VllmEngine], models: dict[str, tuple[Any, str]]
) -> None:
    asked, seeds = tiny.prompts(4), [1, 2, 3, 4]
    one = start("qwen2")
    tiny.write(EngineWeights(one), models["qwen2"][0])
    alone = one.generate(asked, seeds, DRAWN, 2)
    other = start("llama")
    tiny.write(EngineWeights(other), models["llama"][0])
    drawn = other.generate(asked, seeds, DRAWN, 2)
    assert drawn != alone
    assert one.generate(asked, seeds, DRAWN, 2) == alone
    first, second = one.start(asked, seeds, DRAWN, 2), other.start(asked, seeds, DRAWN, 2)
    both = {"other": other.finish(second), "one": one.finish(first)}  # under way at the same time
    assert [both["one"][n : n + 2] for n in range(0, 8, 2)] == alone
    assert [both["other"][n : n + 2] for n in range(0, 8, 2)] == drawn
    with one.inside():
        from vllm.distributed import parallel_state

        groups = parallel_state._TP
    with other.inside():
        assert parallel_state._TP is not None and parallel_state._TP is not groups
    assert parallel_state._TP is None and not parallel_state._groups


def test_the_way_out_of_an_error_restores_everything(group: dist.ProcessGroup) -> None:
    subworld = SubWorld(group, "a job/with: odd name", torch.device("cpu"))
    assert not {":", "/"} & set(subworld.ident)
    environment, default, state = dict(os.environ), dist.group.WORLD, torch.get_rng_state()

    def fail_inside() -> None:
        with subworld.inside():
            assert (os.environ["WORLD_SIZE"], dist.group.WORLD) == ("1", group)
            os.environ["VLLM_DIST_IDENT"] = "set by the engine"
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert dict(os.environ) == environment
    assert dist.group.WORLD is default
    assert torch.equal(torch.get_rng_state(), state)
    with subworld.inside():
        assert os.environ["VLLM_DIST_IDENT"] == "set by the engine"
    subworld.close()


def test_a_failed_start_can_be_repeated(start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no scheduler today")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "__init__", broken)
        with pytest.raises(OSError, match="no scheduler today"):
            start("qwen2")
    assert start("qwen2").loaded.complete is False
