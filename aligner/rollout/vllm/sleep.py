"""Releasing the engine's memory while other roles compute: weights, rewritten by the next sync, and KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligner.rollout.freed_storages import FreedStorages
from aligner.rollout.vllm.garbage import uncollected
from aligner.rollout.vllm.packing import drop_kernels

if TYPE_CHECKING:
    from aligner.rollout.vllm.internals import VllmInternals
    from aligner.rollout.vllm.weights import EngineWeights
    from aligner.spmd.memory import Meter
    from aligner.spmd.residency import Part


WORKSPACE = "workspace"
"""vLLM's tag of memory that its kernels work in and that holds nothing between steps."""


def residency_parts(engine: VllmInternals, weights: EngineWeights, meter: Meter) -> dict[str, Part]:
    """The engine's parts on this rank's device. CUDA: of an engine that was built to sleep."""
    if engine.device.type == "cpu":
        return {"weights": FreedWeights(engine, weights), "cache": FreedCache(engine)}
    cache = SleepingCache(engine, meter)
    return {"weights": SleepingWeights(engine, weights, meter, cache), "cache": cache}


class FreedWeights:
    """Weights on a CPU: packed kernels are dropped, storages of parameters freed."""

    def __init__(self, engine: VllmInternals, weights: EngineWeights) -> None:
        self.resident = True
        self._engine, self._weights = engine, weights
        self._sizes: dict[int, int] = {}
        self._bytes = sum(parameter.nbytes for parameter in engine.model.parameters())

    def bytes(self) -> int:
        """About its size: what packed kernels hold is known from the parameters that they were packed from."""
        return max(self._bytes, self._weights.bytes())

    def changed(self) -> None:
        """Nothing is kept."""

    def evict(self) -> None:
        """Free the weights; the engine cannot generate until the next sync."""
        self._engine.loaded.evict()
        drop_kernels(self._engine.model)
        for parameter in self._engine.model.parameters():
            storage = parameter.untyped_storage()
            self._sizes.setdefault(storage._cdata, storage.nbytes())
            storage.resize_(0)
        self.resident = False

    def bring(self) -> None:
        """Allocate the storages that a sync writes in place; packed kernels allocate their own."""
        for parameter in self._weights.in_place():
            storage = parameter.untyped_storage()
            storage.resize_(self._sizes.get(storage._cdata, storage.nbytes()))
        self._sizes.clear()
        self._weights.clear_padding()
        self.resident = True


class FreedCache:
    """The KV cache on a CPU."""

    def __init__(self, engine: VllmInternals) -> None:
        self.resident = True
        self._engine = engine
        self._storages = FreedStorages(engine.caches)

    def bytes(self) -> int:
        """Its size."""
        return self._storages.bytes()

    def changed(self) -> None:
        """Nothing is kept."""

    def evict(self) -> None:
        """Free the cache; cached prefixes are dropped."""
        self._engine.new_weights()
        self._storages.free()
        self.resident = False

    def bring(self) -> None:
        """Allocate it, zeroed: kernels read beyond the written part and multiply that by 0."""
        self._storages.allocate(zeroed=True)
        self.resident = True


class SleepingWeights:
    """Weights on CUDA: vLLM unmaps the memory tagged "weights"; addresses, which CUDA graphs hold, stay valid.

    Its sleep of level 2 would do the same, and take a cache that is to stay along; like it, buffers are saved. What the kernels
    work in, "workspace", goes with the weights and comes back with whatever is mapped next. Of an engine whose cache is away
    too, CUDA graphs leave for the host, and NCCL's buffers are given back with `rollout.suspend_communicators`; there stay what NCCL
    cannot give back, torch's own communicators and the CUDA context.
    """

    def __init__(self, engine: VllmInternals, weights: EngineWeights, meter: Meter, cache: SleepingCache) -> None:
        self.resident = True
        self._engine, self._weights, self._meter, self._cache = engine, weights, meter, cache
        self._bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def bytes(self) -> int:
        """Its size."""
        return self._bytes

    def changed(self) -> None:
        """Nothing is kept but buffers."""

    def evict(self) -> None:
        """Free the weights; the engine cannot generate until the next sync."""
        self._engine.loaded.evict()
        self._buffers = [(buffer, buffer.to("cpu", copy=True)) for buffer in self._engine.model.buffers()]
        with self._engine.inside(), uncollected():
            self._engine.executor.discard(("weights", WORKSPACE))
            if not self._cache.resident:
                worker = self._engine.executor.driver_worker.worker
                # what is left of the engine's own pools, kept on the host: the graphs, where they are in one
                worker.sleep_mode_backend.suspend(2)
                if worker.vllm_config.model_config.enable_nccl_comm_suspend:
                    _suspend_communicators(self._engine.device)  # `wake_up` resumes them
        # `wake_up` maps everything that is not named, and the executor must not hold that against the next `discard`
        self._engine.executor.sleeping_tags.discard(WORKSPACE)
        self._meter.phantom += self._bytes
        self.resident = False

    def bring(self) -> None:
        """Map the memory again, for a sync to write."""
        self._meter.phantom -= self._bytes
        _release_cached(self._engine.device)
        with self._engine.inside(), uncollected():
            self._engine.executor.wake_up(["weights"])
            for buffer, saved in self._buffers:
                buffer.copy_(saved)
        self._buffers = []
        self._weights.clear_padding()
        self.resident = True


class SleepingCache:
    """The KV cache on CUDA, unmapped and mapped by vLLM through its tag."""

    def __init__(self, engine: VllmInternals, meter: Meter) -> None:
        self.resident = True
        self._engine, self._meter = engine, meter
        self._bytes = sum({(s := c.untyped_storage())._cdata: s.nbytes() for c in engine.caches}.values())

    def bytes(self) -> int:
        """Its size."""
        return self._bytes

    def changed(self) -> None:
        """Nothing is kept."""

    def evict(self) -> None:
        """Free the cache; cached prefixes are dropped."""
        self._engine.new_weights()
        with self._engine.inside():
            self._engine.executor.discard(("kv_cache",))
        self._meter.phantom += self._bytes
        self.resident = False

    def bring(self) -> None:
        """Empty."""
        self._meter.phantom -= self._bytes
        _release_cached(self._engine.device)
        with self._engine.inside(), uncollected():
            self._engine.executor.wake_up(["kv_cache"])
            for cache in self._engine.caches:
                cache.zero_()
        self.resident = True


def _suspend_communicators(device: torch.device) -> None:
    """NCCL gives back the buffers of vLLM's communicators, which must be idle; collective over the replica."""
    from vllm.distributed.parallel_state import suspend_device_comms

    torch.cuda.synchronize(device)
    suspend_device_comms()


def _release_cached(device: torch.device) -> None:
    """vLLM maps memory past torch's allocator, which would not give up for it what has been freed."""
    torch.cuda.synchronize(device)  # copies to the host still hold what is to be mapped
    torch.cuda.empty_cache()
