"""Notes of the libraries that say nothing about a run: kept off the console, so that ours can be read."""

from __future__ import annotations

import warnings

NOTES: tuple[tuple[str, type[Warning]], ...] = (
    # Megatron-core, without the optional kernels of apex and TransformerEngine
    (r"(Transformer Engine and Apex|Apex|Transformer Engine) (are|is) not installed", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"The following imports from `dynamic_context.py` will be removed", DeprecationWarning),
)


def ignore_library_notes() -> None:
    """Ignore exactly these warnings, by their text; every other one is still shown."""
    for message, category in NOTES:
        warnings.filterwarnings("ignore", message=message, category=category)
