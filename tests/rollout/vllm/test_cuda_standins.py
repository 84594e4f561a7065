"""What the engine does on CUDA, on stand-ins for streams, executor and allocator: no device is needed, and none was seen."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.vllm import sleep
from aligner.rollout.vllm.draws import DrawsByGenerator, DrawsByPosition, draws_of
from aligner.rollout.vllm.engine import check_fp8_device
from aligner.rollout.vllm.subworld import SubWorld, compile_cache
from aligner.spmd.memory import Meter

GPU = torch.device("cuda", 3)


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.name)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's current stream as a value, and its random state as one that nobody changes."""
    state: dict[str, Any] = {"current": Stream("default")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state["current"])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: state.update(current=stream))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: None)
    return state


def test_fp8_is_refused_by_name_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        with (
            pytest.raises(ValueError, match=r"A100.* has compute capability 8\.0.* 8\.9 or more")
            if refused
            else nullcontext()
        ):
            check_fp8_device(GPU)


def test_the_stream_of_the_process_is_restored(group: dist.ProcessGroup, streams: dict[str, Any]) -> None:
    subworld, default, own = SubWorld(group, "job", GPU), streams["current"], Stream("vllm")
    with subworld.inside():
        torch.cuda.set_stream(own)  # type: ignore[arg-type]  # as vLLM does at its first computation, for good
    assert streams["current"] is default and default.waited == ["vllm"], (
        "what others launch next comes after vLLM's work"
    )
    with subworld.inside():
        assert streams["current"] is own and own.waited == ["default"], "vLLM's work comes after what others launched"
    assert streams["current"] is default and default.waited == ["vllm", "vllm"]
    with pytest.raises(KeyError), subworld.inside():
        raise KeyError
    assert streams["current"] is default


def test_each_device_has_a_compile_cache_of_its_own(
    group: dist.ProcessGroup, streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    roots = {compile_cache(torch.device("cuda", index))["VLLM_CACHE_ROOT"] for index in range(8)}
    assert len(roots) == 8 and all(Path(root).parent == Path("/caches/vllm") for root in roots)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "~/mine")
    assert Path(compile_cache(GPU)["VLLM_CACHE_ROOT"]).parent == Path.home() / "mine"
    assert compile_cache(torch.device("cpu")) == {}
    subworld, root = SubWorld(group, "job", GPU), compile_cache(GPU)["VLLM_CACHE_ROOT"]
    for _ in range(2):
        with subworld.inside():
            import vllm.envs

            assert os.environ["VLLM_CACHE_ROOT"] == vllm.envs.VLLM_CACHE_ROOT == root
    assert os.environ["VLLM_CACHE_ROOT"] == "~/mine"


def test_fallbacks_are_told_by_one_rank_and_the_runner_can_be_chosen(
    group: dist.ProcessGroup, streams: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    with SubWorld(group, "job", GPU, "2").inside():
        assert (os.environ["VLLM_LOGGING_LEVEL"], os.environ["VLLM_USE_V2_MODEL_RUNNER"]) == ("WARNING", "1")
    with SubWorld(group, "job", torch.device("cpu")).inside():
        assert (os.environ["VLLM_LOGGING_LEVEL"], os.environ["VLLM_USE_V2_MODEL_RUNNER"]) == ("ERROR", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with SubWorld(group, "job", GPU, "2").inside():
        assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_the_draws_of_each_runner() -> None:
    first = SimpleNamespace(device=GPU, requests={}, sample_tokens=lambda grammar: None)
    assert isinstance(draws_of(first), DrawsByGenerator)
    second = draws_of(SimpleNamespace(device=GPU, req_states=object()))
    assert isinstance(second, DrawsByPosition) and second.params(7) == {"seed": 7, "logprobs": 0, "flat_logprobs": True}
    assert second.state("a request") is None


class Allocator:
    """vLLM's executor, worker and allocator as far as the sleep parts see them: which tags are mapped (vllm 0.32,
    `v1/executor/abstract.py`, `device_allocator/cumem.py`)."""

    def __init__(self, collectors: list[Any], suspends: bool) -> None:
        self.mapped = dict.fromkeys(("weights", "kv_cache", "workspace", "cudagraph"), True)
        self.on_host: set[str] = set()
        self.sleeping_tags: set[str] = set()
        settings = SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=suspends))
        self.driver_worker = SimpleNamespace(worker=SimpleNamespace(sleep_mode_backend=self, vllm_config=settings))
        self._collectors = collectors

    def discard(self, tags: tuple[str, ...]) -> None:
        assert set(tags) - self.sleeping_tags == set(tags), "vLLM would leave out what it takes for asleep"
        self.mapped |= dict.fromkeys(tags, False)
        self.sleeping_tags |= set(tags)

    def suspend(self, level: int) -> None:
        self._collectors.append(gc.collect)
        self.on_host |= {tag for tag in ("cudagraph",) if self.mapped[tag]}
        self.mapped = dict.fromkeys(self.mapped, False)

    def wake_up(self, tags: list[str]) -> None:
        assert self.sleeping_tags.issuperset(tags), "vLLM would warn and do nothing"
        self._collectors.append(gc.collect)
        self.mapped |= {tag: True for tag in self.mapped if tag in tags or tag not in ("weights", "kv_cache")}
        self.on_host.clear()
        self.sleeping_tags -= set(tags)


class Engine:
    """A `VllmInternals` on CUDA, of one linear layer, whose memory is the CPU's."""

    def __init__(self, collectors: list[Any], suspends: bool = False) -> None:
        self.device, self.loaded, self.executor = GPU, LoadedWeights(), Allocator(collectors, suspends)
        self.model = torch.nn.Linear(4, 4)
        self.model.register_buffer("table", torch.arange(4.0))
        self.caches = [torch.ones(8), torch.ones(8)]
        self.inside = nullcontext

    def new_weights(self) -> None:
        assert self.executor.mapped["kv_cache"]


@contextmanager
def no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        yield


def test_what_a_sleeping_engine_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    collectors: list[Any] = []
    collect = gc.collect
    engine, meter = Engine(collectors), Meter(torch.device("cpu"))
    weights: Any = SimpleNamespace(clear_padding=lambda: None)
    parts = sleep.residency_parts(engine, weights, meter)  # type: ignore[arg-type]
    mapped = engine.executor.mapped
    with no_device(monkeypatch):
        for _ in range(2):
            parts["cache"].evict()
            assert mapped == {"weights": True, "kv_cache": False, "workspace": True, "cudagraph": True}
            parts["weights"].evict()
            mapped = engine.executor.mapped
            assert not any(mapped.values()) and engine.executor.on_host == {"cudagraph"}
            assert meter.phantom == sum(part.bytes() for part in parts.values())
            engine.model.table.fill_(torch.nan)  # unmapped memory comes back with anything in it
            parts["weights"].bring()
            assert engine.executor.mapped == mapped | {"weights": True, "workspace": True, "cudagraph": True}
            assert engine.model.table.tolist() == [0.0, 1.0, 2.0, 3.0]
            parts["cache"].bring()
            mapped = engine.executor.mapped
            assert all(mapped.values()) and not engine.executor.sleeping_tags and meter.phantom == 0
            assert all(not cache.any() for cache in engine.caches)
        parts["weights"].evict()  # the cache stays
        assert engine.executor.mapped == {"weights": False, "kv_cache": True, "workspace": False, "cudagraph": True}
        parts["weights"].bring()
    assert collect not in collectors and gc.collect is collect, "vLLM's collections look through no object of ours"


@pytest.mark.parametrize("suspends", [False, True])
def test_communicators_of_an_engine_that_is_away(monkeypatch: pytest.MonkeyPatch, suspends: bool) -> None:
    calls: list[str] = []
    engine, meter = Engine([], suspends), Meter(torch.device("cpu"))
    parts = sleep.residency_parts(engine, SimpleNamespace(clear_padding=lambda: None), meter)  # type: ignore[arg-type]
    with no_device(monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
        monkeypatch.setattr(
            "vllm.distributed.parallel_state.suspend_device_comms",
            lambda: calls.append(f"suspend, {'asleep' if not any(engine.executor.mapped.values()) else 'awake'}"),
        )
        parts["weights"].evict()
        assert not calls, "the cache is there: a sync may bring the weights for the next sample"
        parts["weights"].bring()
        calls.clear()
        parts["cache"].evict()
        parts["weights"].evict()
    assert calls == (["wait", "suspend, asleep"] if suspends else [])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_second_runner_draws_by_seed_and_position() -> None:
    """So a sample that is interrupted goes on as it would have, with nothing carried; vLLM's kernel in Triton's interpreter."""
    program = Path(__file__).with_name("gumbel_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]
