"""vLLM's own configuration code under a GPU that is not there: prints, as JSON, what it chooses for our arguments.

    python tests/standins/cuda_configuration.py DEVICE CASES

DEVICE: h100 or b200. CASES: JSON, a list of {folder, architecture, tensor, pipeline, expert_parallel, sleeps, dtype}. The CPU
wheel of vLLM 0.32.0 has the same Python files as the CUDA one, but for the version, the choice of a platform and the CPU's
stand-ins for kernels; with ALIGNER_CUDA_WHEEL=DIR, the folder of an unpacked CUDA wheel, its files are taken.
"""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
from typing import Any

DEVICES = {"h100": ((9, 0), "NVIDIA H100 80GB HBM3", 80 << 30), "b200": ((10, 0), "NVIDIA B200", 180 << 30)}


def fake_platform(device: str) -> Any:
    """vLLM's CUDA platform with what a driver would answer."""
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    capability, name, memory = DEVICES[device]

    class Fake(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return memory

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def is_cumem_allocator_available(cls) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return 8

        @classmethod
        def log_warnings(cls) -> None: ...

    return Fake()


def choices(case: dict[str, Any]) -> dict[str, Any]:
    """The VllmConfig of one engine, as far as we rely on it."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    from aligner.models.read_spec import read_spec
    from aligner.rollout.config import RolloutConfig
    from aligner.rollout.vllm.engine import engine_arguments, engine_sizes

    class Executor(ExecutorWithExternalLauncher):  # as ours, whose sub-world exists on ranks only
        supports_pp = True

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if case["pipeline"] == 1 else "0"
    config = RolloutConfig(
        dtype=case["dtype"],
        gpu_memory_utilization=0.8,
        max_num_seqs=256,
        max_model_len=64,
        quantization=case["quantization"],
        suspend_communicators=case["suspends"],
    )
    spec = read_spec(case["folder"])
    sizes = engine_sizes(
        spec, config, case["tensor"], case["pipeline"], case["expert_parallel"], case["sleeps"], cpu=False
    )
    arguments = engine_arguments(case["folder"], "cuda", config, sizes, Executor)
    made = arguments.create_engine_config()
    return {
        "async_scheduling": made.scheduler_config.async_scheduling,
        "runner": 2 if made.use_v2_model_runner else 1,
        "unsupported": made._get_v2_model_runner_unsupported_features(),
        "dtype": str(made.model_config.dtype),
        "sleep": made.model_config.enable_sleep_mode,
        "communicators_leave": made.model_config.enable_nccl_comm_suspend,
        "graphs_leave": made.use_cumem_cudagraph_pool,
        "cudagraphs": made.compilation_config.cudagraph_mode.name,
        "compiled": made.compilation_config.mode.name,
        "block_size": made.cache_config.block_size,
        "prefix_caching": made.cache_config.enable_prefix_caching,
        "memory_share": made.cache_config.gpu_memory_utilization,
        "tensor": made.parallel_config.tensor_parallel_size,
        "pipeline": made.parallel_config.pipeline_parallel_size,
        "experts": made.parallel_config.enable_expert_parallel,
        "linear_backend": made.kernel_config.linear_backend,
        "fp8": vars(made.quant_config) if made.quant_config else None,
        "fp8_kernel": fp8_kernel(made) if made.quant_config else None,
        "moe_backend": made.kernel_config.moe_backend,
        "logprobs": made.model_config.logprobs_mode,
        "quantization": made.model_config.quantization,
        "chunked_prefill": made.scheduler_config.enable_chunked_prefill,
        "max_num_seqs": made.scheduler_config.max_num_seqs,
        "executor": getattr(made.parallel_config.distributed_executor_backend, "__name__", None),
    }


def fp8_kernel(made: Any) -> dict[str, Any]:
    """The kernel that vLLM takes for a linear layer in FP8 blocks, and whether it leaves weights and scales as they are loaded."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, create_fp8_quant_key

    weights, activations = (
        create_fp8_quant_key(static=static, group_shape=GroupShape(rows, 128))
        for static, rows in ((True, 128), (False, 1))
    )
    layer = linear.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weights, activation_quant_key=activations, input_dtype=torch.bfloat16, out_dtype=torch.bfloat16,
        weight_shape=(256, 256),
    )  # fmt: skip
    with set_current_vllm_config(made):
        kernel = linear.choose_scaled_mm_linear_kernel(
            layer, linear._POSSIBLE_FP8_BLOCK_KERNELS, quantization="fp8_block_w8a8"
        )
    plain = kernel.process_weights_after_loading is Fp8BlockScaledMMLinearKernel.process_weights_after_loading
    return {"name": kernel.__name__, "plain": plain}


def main() -> None:
    device, cases = sys.argv[1], json.loads(sys.argv[2])
    wheel = os.environ.get("ALIGNER_CUDA_WHEEL")
    if wheel:
        sys.path.insert(0, wheel)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):  # the kernels, which nothing here calls
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    warnings.simplefilter("ignore")
    import vllm.config.vllm
    import vllm.engine.arg_utils
    import vllm.platforms
    from vllm.model_executor.layers.quantization import get_quantization_config

    from aligner.rollout.vllm.engine import _register

    get_quantization_config("fp8")  # imports them all, which ask the platform's kernels what they can
    for architecture in {
        case["architecture"] for case in cases
    }:  # model code wants the kernels of the platform that it finds
        _register(architecture)
    vllm.platforms._current_platform = platform = fake_platform(device)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "current_platform" in vars(module):
            module.current_platform = platform  # type: ignore[attr-defined]
        if name.startswith("vllm.") and "HAS_TRITON" in vars(module):
            module.HAS_TRITON = True  # type: ignore[attr-defined]
    print(json.dumps([choices(case) for case in cases]))


if __name__ == "__main__":
    main()
