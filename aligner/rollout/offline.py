"""Offline batch generation: weights from a folder, no training; what is the same for every engine."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

from aligner.rollout.config import Sampling
from aligner.rollout.requests import Sample

DECIDES = (
    "*.safetensors",
    "*.bin",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.py",
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


class OfflineEngine(ABC):
    """An engine in this process, with the weights of a folder."""

    @abstractmethod
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
        """Args:
            stop: tokens that end an answer.
            trust_remote_code: Python files of the folder that its config.json names (auto_map) may be run.
            kv_cache_mib: vLLM's, of each rank; None: on CUDA what `gpu_memory_utilization` leaves, on a CPU 1024.

        Raises:
            ValueError: settings and model do not go together.
        """

    @abstractmethod
    def answers(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, num_samples: int = 1
    ) -> list[list[Sample]]:
        """`num_samples` answers to each prompt, sample i drawn with seed `seeds[prompt] + i`.

        No state is kept between calls, so equal calls give equal answers.
        """


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
