"""A vLLM engine on a subset of the world's ranks: inside a `SubWorld`, torch and vLLM see only the replica's ranks."""

from __future__ import annotations

import gc
import os
import platform
import random
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from aligner.rollout.vllm.garbage import collector_kept
from aligner.spmd.serialization import deserialize, serialize

T = TypeVar("T")
_QUIET = {"VLLM_NO_USAGE_STATS": "1"}
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_PARALLEL_STATE = (
    "_WORLD", "_INNER_DP_WORLD", "_NODE_COUNT", "_TP", "_ETP", "_ENGRAM_DP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB",
)  # fmt: skip
"""Globals of vllm.distributed.parallel_state: an engine's process groups."""
_GROUP_NAMES = ("_groups", "_group_name_counter")
"""Its registry of groups by name, and how many there are of each name."""
_IGNORED = ("VLLM_CPU_KVCACHE_SPACE",)  # would silently win over rollout.kv_cache_mib


class SubWorld:
    """The ranks of one replica as a world of their own, entered with `inside()`, or to pack weights with `packing()`; vLLM runs nowhere else.

    vLLM uses torch's default process group, RANK and WORLD_SIZE as its own and changes much global state of the process;
    on leaving, all of it is restored. So a process can hold several engines.
    """

    def __init__(
        self, group: dist.ProcessGroup, ident: str, device: torch.device, runner: Literal["1", "2"] = "1"
    ) -> None:
        """Collective over `group`, whose members are the replica; `ident` names it in shared memory; `runner`: the version of
        vLLM's model runner."""
        self.group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        token = self._agree(secrets.randbelow(1 << 40))
        # The stock name of vLLM's shared memory is equal for every job on the host.
        self.ident = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', ident)}-{token:x}"
        self.local_rank = device.index or 0 if device.type == "cuda" else self.rank
        # vLLM numbers its process groups from here: never a name that another replica or an earlier engine used.
        self._group_count = 1_000_000 + token
        self._threads = torch.get_num_threads()
        self._parallel_state: dict[str, Any] = dict.fromkeys(_PARALLEL_STATE) | {name: {} for name in _GROUP_NAMES}
        self._stream: torch.cuda.Stream | None = None
        """The stream that vLLM makes on CUDA at its first computation, and captures its graphs on."""
        choices = {
            **_QUIET,
            # Read once, when vllm is first imported. On CUDA a warning tells that a slower kernel or all-reduce was taken.
            "VLLM_LOGGING_LEVEL": "WARNING" if device.type == "cuda" and self.rank == 0 else "ERROR",
            "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "2")),
        }
        self._environment = {
            **{name: os.environ.get(name, value) for name, value in choices.items()},
            **compile_cache(device),
            **_FORCED,
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.size),
        }

    def _agree(self, token: int) -> int:
        shared = torch.tensor([token], dtype=torch.int64)
        if self.size > 1:
            dist.broadcast(shared, group=self.group, group_src=0)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value; collective over the replica."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def from_first(self, value: T) -> T:
        """The value of the replica's first rank, on all of its ranks; collective over the replica. None is one small message."""
        if self.size == 1:
            return value
        content = torch.empty(0, dtype=torch.uint8)
        if self.rank == 0 and value is not None:
            content = torch.from_numpy(serialize(value))
        size = torch.tensor([len(content)], dtype=torch.int64)
        dist.broadcast(size, group=self.group, group_src=0)
        if not int(size):
            return value if self.rank == 0 else None  # type: ignore[return-value]
        if self.rank:
            content = content.new_empty(int(size))
        dist.broadcast(content, group=self.group, group_src=0)
        return value if self.rank == 0 else deserialize(content.numpy())  # type: ignore[no-any-return]

    def first_says(self, question: Callable[[], bool]) -> bool:
        """The answer of the replica's first rank, on all of its ranks; collective over the replica."""
        if self.size == 1:
            return question()
        answer = torch.tensor([self.rank == 0 and question()], dtype=torch.int64)
        dist.broadcast(answer, group=self.group, group_src=0)
        return bool(answer)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Set the global state that vLLM's engine needs; restored on exit, also after an exception."""
        with _random_states(self.device), self._own_environment(), self.packing():
            yield

    @contextmanager
    def packing(self) -> Iterator[None]:
        """As `inside`, for code that neither draws random numbers nor sets environment variables: packing weights, a kernel
        called by itself. Entered in a fifth of the time."""
        with ExitStack() as stack:
            stack.enter_context(self._own_stream())
            stack.enter_context(self._own_threads())
            stack.enter_context(self._own_default_group())
            stack.enter_context(self._own_parallel_state())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def starting(self) -> Iterator[None]:
        """As `inside`, while the engine is built; collective. Files needed only for the start are removed afterwards."""
        sockets = tempfile.mkdtemp(prefix="aligner-")
        self._environment["VLLM_RPC_BASE_PATH"] = sockets
        try:
            with self.inside(), _memory_policy_kept(), collector_kept(self.device):
                yield
            if self.size > 1:
                dist.barrier(group=self.group)  # all ranks have opened the files
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(sockets, ignore_errors=True)
            for segment in Path("/dev/shm").glob(f"{self.ident}-*"):  # vLLM would leave them to the next reboot
                segment.unlink(missing_ok=True)

    @contextmanager
    def _own_default_group(self) -> Iterator[None]:
        world = c10d._world
        default, count = world.default_pg, world.group_count
        c10d._update_default_pg(self.group)
        world.group_count = self._group_count
        try:
            yield
        finally:
            self._group_count = world.group_count
            # Ranks outside the replica made no groups: the names of later groups must agree with theirs.
            world.group_count = count
            c10d._update_default_pg(default)

    @contextmanager
    def _own_parallel_state(self) -> Iterator[None]:
        """vLLM keeps its process groups in globals, and finds them there by names that count up: each engine has its own,
        so that the names of a replica's ranks agree whatever other engines these have."""
        module = sys.modules.get("vllm.distributed.parallel_state")  # not yet: vLLM is imported inside, with settings
        before = {name: getattr(module, name) for name in self._parallel_state} if module else {}
        for name, value in self._parallel_state.items() if module else ():
            setattr(module, name, value)
        try:
            yield
        finally:
            module = sys.modules.get("vllm.distributed.parallel_state")
            if module is not None:
                fresh: dict[str, Any] = dict.fromkeys(_PARALLEL_STATE) | {name: {} for name in _GROUP_NAMES}
                self._parallel_state = {name: getattr(module, name) for name in self._parallel_state}
                for name, value in (before or fresh).items():
                    setattr(module, name, value)

    @contextmanager
    def _own_environment(self) -> Iterator[None]:
        # The bytes below os.environ: to decode all variables takes longer than all else that an entry does.
        raw: Any = os.environ._data  # type: ignore[attr-defined]
        before = dict(raw)
        os.environ.update(self._environment)
        for name in _IGNORED:
            os.environ.pop(name, None)
        try:
            yield
        finally:
            changed = [name for name, value in raw.items() if before.get(name) != value]
            # What vLLM has set is there again at the next entry; it reads its variables late.
            self._environment.update({os.fsdecode(name): os.environ[os.fsdecode(name)] for name in changed})
            for name in (name for name in changed if name not in before):
                del os.environ[os.fsdecode(name)]
            for name, value in before.items():
                if raw.get(name) != value:
                    os.environ[os.fsdecode(name)] = os.fsdecode(value)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """vLLM leaves the process on a stream of its own; what other roles have launched comes before it, and their next after."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.current_stream(self.device)
        if self._stream is not None:
            self._stream.wait_stream(before)
            torch.cuda.set_stream(self._stream)
        try:
            yield
        finally:
            own = torch.cuda.current_stream(self.device)
            if own != before:
                before.wait_stream(own)
                torch.cuda.set_stream(before)
                self._stream = own

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        setter, threads, precision = (
            torch.set_num_threads,
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
        )
        # vLLM's shared-memory collectives are laid out for the thread count that they were made with.
        if threads != self._threads:
            setter(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads = setter  # vLLM's CPU worker makes it a no-op
            if torch.get_num_threads() != threads:
                setter(threads)
            torch.set_float32_matmul_precision(precision)

    def close(self) -> None:
        """Destroy vLLM's process groups; collective over the replica, also after a failed start.

        vLLM's own shutdown would destroy the world's process group.
        """
        with self.inside():
            from vllm import envs
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
            parallel_state._WORLD = parallel_state._INNER_DP_WORLD = parallel_state._NODE_COUNT = None
            envs.disable_envs_cache()
        gc.collect()


def compile_cache(device: torch.device) -> dict[str, str]:
    """The environment of a cache of compiled code for this device alone.

    vLLM names what it compiles after the rank in the replica, not after the device, and each replica of one rank is rank 0:
    one that loads the code of another's device fails with "CUDA driver error: invalid argument".
    """
    if device.type != "cuda":
        return {}
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or Path(home) / "vllm").expanduser()
    return {"VLLM_CACHE_ROOT": str(root / f"{platform.node()}-dev{device.index or 0}")}


def executor_class(subworld: SubWorld) -> type[Any]:
    """vLLM's in-process executor with rank and size of the sub-world instead of torchrun's."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class SubWorldExecutor(ExecutorWithExternalLauncher):
        supports_pp = True

        def _init_executor(self) -> None:
            if self.parallel_config.pipeline_parallel_size > 1:
                # vLLM gives the last stage's samples to every rank of a replica only under this name.
                self.parallel_config.distributed_executor_backend = "external_launcher"
            super()._init_executor()

        def _distributed_args(self) -> tuple[str, int, int]:
            # Process groups exist already, so the address is never dialled; its tail names the shared memory.
            return f"tcp://subworld:{subworld.ident}", subworld.rank, subworld.local_rank

    return SubWorldExecutor


@contextmanager
def _memory_policy_kept() -> Iterator[None]:
    """Prevent vLLM from binding this process's memory to one NUMA node: other roles use the process too."""
    import vllm._custom_ops  # noqa: F401  (loads the operators)

    operators: Any = torch.ops._C
    bind = getattr(operators, "init_cpu_memory_env", None)  # only the CPU build has it
    if bind is not None:
        operators.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        if bind is not None:
            operators.init_cpu_memory_env = bind


@contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
