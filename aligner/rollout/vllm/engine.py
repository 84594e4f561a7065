"""One replica's vLLM engine: token ids in, sampled token ids and their log-probabilities out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist

from aligner.models.agreement import check_agreement
from aligner.models.read_spec import read_spec
from aligner.models.tensors import architecture_of, router_tensor
from aligner.reshard.plan.block_scales import BLOCK
from aligner.rollout.config import BESIDE_OTHERS, RolloutConfig, Sampling
from aligner.rollout.engine import RolloutEngine, SharedTensors
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.quantization import SETTING
from aligner.rollout.requests import Sample
from aligner.rollout.vllm import cpu_norms
from aligner.rollout.vllm.cpu_rotary import mend_cpu_rotary
from aligner.rollout.vllm.cpu_single_rows import compute_single_rows_as_two
from aligner.rollout.vllm.experts import mend_cpu_expert_parallel
from aligner.rollout.vllm.garbage import collector_kept
from aligner.rollout.vllm.requests import VllmRequests
from aligner.rollout.vllm.sizes import BLOCK_TOKENS, check_runs, kv_cache_bytes
from aligner.rollout.vllm.sleep import residency_parts
from aligner.rollout.vllm.subworld import SubWorld, executor_class
from aligner.rollout.vllm.weights import EngineWeights

if TYPE_CHECKING:
    from aligner.models.spec import ModelSpec
    from aligner.reshard.plan.layout import WeightLayout
    from aligner.spmd.memory import Meter
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.residency import Part

T = TypeVar("T")
LOAD_FORMAT = "dummy"
"""vLLM starts with placeholder weights: the policy's arrive by resharding."""

FP8_CAPABILITY = (8, 9)
"""The first that multiplies E4M3 numbers."""


class VllmEngine(RolloutEngine):
    """vLLM in this process, for the replica whose ranks are `group`.

    A process may hold several engines; on CUDA one of those that `sleeps`.
    """

    def __init__(
        self,
        model_path: str | Path,
        group: dist.ProcessGroup,
        ident: str,
        config: RolloutConfig,
        device: torch.device,
        expert_parallel: bool = False,
        pipeline: int = 1,
        sleeps: bool = False,
        stop: Sequence[int] | None = None,
        loaded: LoadedWeights | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Collective over `group`, which must carry CPU tensors; `ident` names the replica among this host's.

        Args:
            group: the replica's ranks, tensor neighbours adjacent; its size is tensor x pipeline.
            expert_parallel: each rank of the replica holds whole experts, rather than a part of every expert.
            sleeps: CUDA: weights and cache must be able to leave the device (`rollout.sleep`).
            stop: tokens that end a response; None: those that the model's own files name.
            loaded: the role's record of which weights its engines hold; None: one of this engine's own.
            trust_remote_code: Python files of the folder may be run.

        Raises ValueError where the settings and the model do not go together.
        """
        self.spec, self.config, self.device = read_spec(str(model_path), trust_remote_code), config, device
        cpu, architecture = device.type == "cpu", architecture_of(self.spec)
        tensor = dist.get_world_size(group) // pipeline
        check_runs(config, self.spec, tensor, cpu, expert_parallel, pipeline)
        if config.quantization == "fp8" and not cpu:
            check_fp8_device(device)
        self.loaded = loaded or LoadedWeights()
        """Which weights the engine holds; `EngineWeights` says when they are written."""
        # The second runner draws all requests with one kernel and holds nothing of their streams; it is not for CPUs, and of a
        # pipeline only the first one's last stage tells the others what was drawn.
        self._subworld = SubWorld(group, ident, device, "1" if cpu or pipeline > 1 else "2")
        with self._subworld.inside():
            _platform(device)
        with self._subworld.starting():
            _register(architecture)
            sizes = engine_sizes(self.spec, config, tensor, pipeline, expert_parallel, sleeps, cpu)
            self._llm = _build(model_path, self._subworld, config, sizes)
            check_agreement(self.spec, self._llm.model_config.hf_text_config, "the rollout engine")
        if pipeline > 1:
            self._receive_buffer()
        self._weights: EngineWeights | None = None
        ends = self.spec.eos_token_ids if stop is None else stop
        self.requests: VllmRequests = VllmRequests(self._llm, self._worker.model_runner, ends, self.loaded)
        """What is being generated."""

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        mesh: Mesh,
        group: dist.ProcessGroup,
        ident: str,
        config: RolloutConfig,
        device: torch.device,
        *,
        layout: WeightLayout,
        sleeps: bool,
        loaded: LoadedWeights,
        shared: SharedTensors | None = None,
    ) -> Self:
        """Of a role's mesh."""
        assert shared is None, "vLLM computes with weights in layouts of its own"
        engine = cls(
            spec.path,
            group,
            ident,
            config,
            device,
            mesh.expert > 1,
            mesh.pipeline,
            sleeps,
            spec.eos_token_ids,
            loaded,
            spec.trust_remote_code,
        )
        engine._weights = EngineWeights(engine, layout)
        return engine

    @property
    def weights(self) -> EngineWeights:
        """The parameters of vLLM's model, through its packed kernels."""
        if self._weights is None:
            self._weights = EngineWeights(self)
        return self._weights

    def parts(self, meter: Meter) -> Mapping[str, Part]:
        """Freed storages on a CPU, unmapped memory on CUDA."""
        return residency_parts(self, self.weights, meter)

    @property
    def model(self) -> torch.nn.Module:
        """vLLM's model, this rank's shard."""
        return self._worker.model_runner.model

    @property
    def caches(self) -> list[torch.Tensor]:
        """The KV cache, a tensor for each layer."""
        return list(self._worker.model_runner.kv_caches)

    @property
    def executor(self) -> Any:
        """vLLM's executor, which puts the engine to sleep."""
        return self._llm.model_executor

    @property
    def _worker(self) -> Any:
        return self._llm.model_executor.driver_worker.worker

    def _receive_buffer(self) -> None:
        """What a later pipeline stage receives into: vLLM makes it in a trial run, which a CPU's engine leaves out."""
        runner = self._worker.model_runner
        if runner.broadcast_pp_output and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The surroundings that vLLM's own code needs; the process is as before afterwards."""
        from vllm.config import set_current_vllm_config

        with self._subworld.inside(), set_current_vllm_config(self._worker.vllm_config), torch.no_grad():
            yield

    @contextmanager
    def packing(self) -> Iterator[None]:
        """As `inside`, for packing weights and calling kernels: what draws no random numbers and sets no environment variables."""
        from vllm.config import set_current_vllm_config

        with self._subworld.packing(), set_current_vllm_config(self._worker.vllm_config), torch.no_grad():
            yield

    def resume(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Take samples into work that may have been begun before; see `Requests.start`. Returns what `finish` takes."""
        self.loaded.check()
        with self.inside():
            return self.requests.start(samples, sampling, step_tokens)

    def finish(self, ticket: int) -> list[Sample]:
        """Generate until the samples of one `start` or `resume` are there, in its order."""
        with self.inside():
            return self.requests.finish(ticket)

    def work_until(self, enough: Callable[[], bool]) -> None:
        """Generate until `enough()`, asked on the replica's first rank before each token, or until nothing is left."""
        with self.inside():
            while self.requests.under_way and not self._subworld.first_says(enough):
                self.requests.advance()

    def working(self) -> AbstractContextManager[None]:
        """As `inside`."""
        return self.inside()

    def from_first(self, value: T) -> T:
        """What the replica's first rank gives, on all of its ranks; collective over the replica."""
        return self._subworld.from_first(value)

    def gather(self, value: Any) -> list[Any]:
        """The value that each rank of the replica gives; collective."""
        return self._subworld.gather(value)

    def new_weights(self) -> None:
        """Forget every KV cache entry, all of which the weights before computed; what is under way is read anew."""
        if not self._llm.reset_prefix_cache(reset_running_requests=self.requests.under_way > 0):
            raise RuntimeError("the rollout engine could not empty its KV cache.")

    def close(self) -> None:
        """Free the engine; collective over the replica. The process can then make another one."""
        core = self._llm.engine_core
        core._finalizer.detach()  # would destroy the world's process group
        with self._subworld.inside(), collector_kept(self.device):
            core.engine_core.structured_output_manager.clear_backend()
            core.engine_core.model_executor.shutdown()
            core.engine_core.scheduler.shutdown()
        self.loaded.evict()
        self._llm = None
        self._subworld.close()


def check_fp8_device(device: torch.device) -> None:
    """Raises ValueError where the GPU cannot multiply E4M3 numbers: vLLM's Triton kernel would fail at its first launch."""
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ValueError(
            f"{SETTING}: {torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}, and FP8 "
            f"takes {'.'.join(map(str, FP8_CAPABILITY))} or more (Ada, Hopper, Blackwell); use rollout.quantization=none."
        )


def _platform(device: torch.device) -> None:
    """Import vLLM, whose platform must be the device's."""
    # vLLM logs while it is imported, before it reads its own setting.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise ValueError(
            f"the installed vLLM runs on {current_platform.device_type or 'no device'}, this rank on {device.type}; "
            f"install the extra .[{'cpu' if device.type == 'cpu' else 'cuda'}]."
        )
    if device.type == "cpu":
        # Compiling the sampler's small kernels takes 7 to 13 s and gains nothing on a CPU. Must precede other imports.
        type(current_platform).simple_compile_backend = "eager"
        mend_cpu_expert_parallel()
        mend_cpu_rotary()
        compute_single_rows_as_two()


def _register(architecture: str) -> None:
    """Tell vLLM the model's class: it would start a second Python to look at the class, which takes 10 s."""
    from vllm import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    if known is not None:
        ModelRegistry.register_model(architecture, known.load_model_cls())


def _build(model_path: str | Path, subworld: SubWorld, config: RolloutConfig, sizes: Mapping[str, Any]) -> Any:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    executor = executor_class(subworld)
    arguments = engine_arguments(model_path, subworld.device.type, config, sizes, executor)
    return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)


def engine_sizes(
    spec: ModelSpec,
    config: RolloutConfig,
    tensor: int,
    pipeline: int,
    expert_parallel: bool,
    sleeps: bool,
    cpu: bool,
) -> dict[str, Any]:
    """What of vLLM's EngineArgs depends on the model and its placement."""
    overrides: dict[str, Any] = {"architectures": [architecture_of(spec)]}  # config.json may leave it out
    if config.quantization == "fp8":
        overrides["quantization_config"] = _as_fp8(spec)
    return {
        "hf_overrides": overrides,
        # The kernel that reads FP8 weights and their scales as they are written; DeepGEMM re-lays them out.
        "linear_backend": "auto" if config.quantization == "none" else "triton",
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "enable_expert_parallel": expert_parallel,
        "kv_cache_memory_bytes": kv_cache_bytes(config, spec, tensor, cpu, pipeline),
        "enable_sleep_mode": sleeps and not cpu,
        # else they stay on the device while the engine sleeps
        "sleep_mode_offload_cudagraph": sleeps and not cpu,
        "enable_nccl_comm_suspend": config.suspend_communicators and sleeps and not cpu,
        "max_model_len": config.length(spec),
        "trust_remote_code": spec.trust_remote_code,
    }


def _as_fp8(spec: ModelSpec) -> dict[str, Any]:
    """What the config.json of a checkpoint of this model in FP8 would say; vLLM leaves embedding, output layer and norms alone."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [
            router_tensor(spec, layer).removesuffix(".weight") for layer in (spec.sparse_layers if spec.experts else ())
        ],
    }


def engine_arguments(
    model_path: str | Path,
    device: str,
    config: RolloutConfig,
    sizes: Mapping[str, Any],
    executor: Any,
) -> Any:
    """vLLM's EngineArgs.

    Args:
        device: cpu or cuda.
        sizes: `engine_sizes`.
        executor: vLLM's, in this process.
    """
    from vllm.engine.arg_utils import EngineArgs

    cpu = device == "cpu"
    return EngineArgs(
        model=str(model_path),
        config_format="hf",  # a params.json beside it says the same of other files
        skip_tokenizer_init=True,
        load_format=LOAD_FORMAT,
        generation_config="vllm",
        dtype=config.dtype,  # type: ignore[arg-type]
        seed=0,
        **sizes,
        # The kernel that reads experts as they are written; CUDA's others re-lay them out. A CPU has one only.
        moe_backend="auto" if cpu else "triton",
        distributed_executor_backend=executor,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_batched_tokens,
        block_size=BLOCK_TOKENS,  # type: ignore[arg-type]
        gpu_memory_utilization=config.gpu_memory_utilization or BESIDE_OTHERS,
        enable_prefix_caching=config.prefix_caching,
        enforce_eager=config.enforce_eager or cpu,
        # The next step would be scheduled before this one's tokens are known: weights in flight, partial responses and
        # interruptions count on what a step has drawn. A CPU never does it.
        async_scheduling=False,
        **({"ir_op_priority": cpu_norms.priority()} if cpu else {}),
        # The default reports log-probabilities before temperature, top-k and top-p.
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
