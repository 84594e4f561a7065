"""Offline batch generation with vLLM: weights from a folder, no training."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from aligner.rollout.config import CPU_KV_CACHE_LIMIT_MIB, Sampling
from aligner.rollout.requests import Sample, request_params

DECIDES = (
    "*.safetensors",
    "*.bin",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
)
"""Files of a model's folder that determine its answers."""
BLOCKS, BLOCK_BYTES = 64, 4096
"""Blocks, and bytes of each, that a fingerprint reads of a large file."""
OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class OfflineEngine:
    """A vLLM engine in this process; with `tensor` > 1 it has worker processes."""

    def __init__(
        self,
        model: str | Path,
        *,
        stop: Sequence[int],
        tensor: int = 1,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int = 256,
        kv_cache_mib: int | None = None,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        """Args:
        stop: tokens that end an answer.
        kv_cache_mib: of each rank; None: on CUDA what `gpu_memory_utilization` leaves, on a CPU 1024.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # batches that depend on nothing but what is asked
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # as in training: each request draws from its own stream
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it speaks before it reads that
        sizes: dict[str, Any] = {
            "tensor_parallel_size": tensor,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        self._stop = stop
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._llm = _start(model, dtype, sizes, kv_cache_mib)

    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Sample]]:
        """`num_samples` answers to each prompt, sample i drawn with seed `seeds[prompt] + i`.

        No state is kept between calls, so equal calls give equal answers.
        """
        asked = [
            Sample(list(prompt), seed + i)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for i in range(num_samples)
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": one.prompt} for one in asked],
            [request_params(sampling, one.seed, sampling.max_tokens, self._stop) for one in asked],
            use_tqdm=False,
        )
        self._llm.reset_prefix_cache()
        answers = [_answer(one, output.outputs[0]) for one, output in zip(asked, outputs, strict=True)]
        return [answers[first : first + num_samples] for first in range(0, len(answers), num_samples)]


def _start(model: str | Path, dtype: str, sizes: dict[str, Any], kv_cache_mib: int | None) -> Any:
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    if cpu:
        # Compiling the sampler's small kernels takes 7 to 13 s and gains nothing on a CPU.
        type(current_platform).simple_compile_backend = "eager"
        if sizes["tensor_parallel_size"] > 1:  # else each worker wants a NUMA node of its own
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        kv_cache_mib = CPU_KV_CACHE_LIMIT_MIB if kv_cache_mib is None else kv_cache_mib
    if kv_cache_mib is not None:
        sizes["kv_cache_memory_bytes"] = kv_cache_mib << 20
    from vllm import LLM

    return LLM(
        str(model),
        skip_tokenizer_init=True,
        generation_config="vllm",  # what is not said by the caller is vLLM's default, not the folder's
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=cpu,
        seed=0,
        logprobs_mode="processed_logprobs",
        use_tqdm_on_load=False,
        **sizes,
    )


def _answer(asked: Sample, output: Any) -> Sample:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the engine ended an answer with {output.finish_reason!r}.")
    return Sample(
        asked.prompt,
        asked.seed,
        list(output.token_ids),
        list(output.logprobs.logprobs),
        ended=True,
        truncated=output.finish_reason == "length",
    )


def fingerprint(model: str | Path) -> str:
    """A digest of the files that determine a model's answers; of large files, of blocks spread over them."""
    digest = hashlib.blake2b(digest_size=16)
    folder = Path(model)
    for path in sorted({path for pattern in DECIDES for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for offset in _offsets(size):
                file.seek(offset)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _offsets(size: int) -> Iterator[int]:
    if size <= BLOCKS * BLOCK_BYTES:
        yield from range(0, size, BLOCK_BYTES)
    else:
        yield from ((size - BLOCK_BYTES) * block // (BLOCKS - 1) for block in range(BLOCKS))


def take_devices(environment: MutableMapping[str, str], tensor: int) -> tuple[int, int]:
    """Under torchrun, assign each process its own devices; call it before anything initialises a device.

    Returns:
        (this process's number, how many there are); (0, 1) without torchrun.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names too few devices for the processes of this machine.
    """
    rank, count = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    local, beside = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if count > 1:
        named = environment.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(device) for device in range(beside * tensor)]
        if len(devices) < beside * tensor:
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES={named} names {len(devices)} devices, and {beside} processes with --tensor {tensor} "
                f"need {beside * tensor}; start fewer, or name more."
            )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[local * tensor : (local + 1) * tensor])
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # all would bind to the same cores
    # The engine makes its own process groups: torchrun's variables would give it a wrong rank and size.
    for name in [*OF_A_LAUNCHER, *(name for name in environment if name.startswith("TORCHELASTIC_"))]:
        environment.pop(name, None)
    return rank, count
