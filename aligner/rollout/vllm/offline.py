"""Offline batch generation with vLLM."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligner.rollout.config import Sampling
from aligner.rollout.offline import OfflineEngine
from aligner.rollout.requests import Sample
from aligner.rollout.vllm.draws import seed_params
from aligner.rollout.vllm.requests import request_params
from aligner.rollout.vllm.sizes import CPU_KV_CACHE_LIMIT_MIB


class VllmOffline(OfflineEngine):
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
        trust_remote_code: bool = False,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # batches that depend on nothing but what is asked
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # each request draws from its own stream
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # it speaks before it reads that
        sizes: dict[str, Any] = {
            "tensor_parallel_size": tensor,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "trust_remote_code": trust_remote_code,
        }
        self._stop = stop
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._llm = _start(model, dtype, sizes, kv_cache_mib)

    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Sample]]:
        """The seed of a request is that of vLLM's own generators."""
        asked = [
            Sample(list(prompt), seed + i)
            for prompt, seed in zip(prompts, seeds, strict=True)
            for i in range(num_samples)
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": one.prompt} for one in asked],
            [request_params(sampling, sampling.max_tokens, self._stop, **seed_params(one.seed)) for one in asked],
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
