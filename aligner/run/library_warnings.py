"""Notes of the libraries that say nothing about a run: kept off the console, so that ours can be read."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Megatron-core, without the optional kernels of apex and TransformerEngine
    (r"(Transformer Engine and Apex|Apex|Transformer Engine) (are|is) not installed", UserWarning),
    (r"absl\.logging is not installed", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"The following imports from `dynamic_context.py` will be removed", DeprecationWarning),
)
"""(regular expression of the beginning, category)."""

LOGGED: tuple[tuple[str, str], ...] = (
    # Megatron-core 0.19: a successor of the model's class, and a layout that it computes as we would
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    # a CUDA build of torch that computes on the CPU
    ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME="),
)
"""(logger, beginning of the message)."""


@dataclass(frozen=True)
class _Without:
    """A filter of log records by the message's beginning."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def ignore_library_notes() -> None:
    """Ignore exactly these, by their text; every other one is still shown."""
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, beginning in LOGGED:
        logging.getLogger(name).addFilter(_Without(beginning))  # an equal filter is not added again
