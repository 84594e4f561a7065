"""Convert a checkpoint offline, without torchrun:

python tools/convert.py MODEL OUT --layout tensor=2,pipeline=4     one file for each rank, readable under any layout
python tools/convert.py SHARDS OUT --layout huggingface            back
python tools/convert.py RUN/checkpoints/step-00000050/policy OUT   a training checkpoint
python tools/convert.py MODEL OUT --dtype bfloat16                 another data type
python tools/convert.py MODEL OUT --file-bytes 2000000000          other files
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors import SafetensorError

from aligner.checkpoint.convert import convert
from aligner.models.checkpoint import FILE_BYTES
from aligner.paths import path_option
from aligner.reshard.plan.region import ELEMENT_BYTES
from aligner.trainer.megatron.layout import MegatronSharding

SIZES = [field.name for field in fields(MegatronSharding)]


def layout(text: str) -> MegatronSharding | None:
    """`huggingface`, or sizes such as tensor=2,pipeline=4."""
    if text == "huggingface":
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in SIZES or name in sizes or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not understood; use huggingface, or sizes of {', '.join(SIZES)} such as tensor=2,pipeline=4"
            )
        sizes[name] = int(size)
    return MegatronSharding(**sizes)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        type=path_option,
        help="a Hugging Face checkpoint, a role of a training checkpoint, or shards of this tool",
    )
    parser.add_argument("out", type=path_option, help="the folder to write; a checkpoint that stands there is replaced")
    parser.add_argument("--layout", type=layout, default=None, help="huggingface (default), or sizes by comma")
    parser.add_argument("--dtype", choices=list(ELEMENT_BYTES), help="of the written weights (default: as they are)")
    parser.add_argument("--file-bytes", type=int, default=FILE_BYTES, help="split Hugging Face files beyond this size")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the model class in the folder's Python files (auto_map)"
    )
    args = parser.parse_args(arguments)
    try:
        row = convert(args.source, args.out, args.layout, args.dtype, args.file_bytes, args.trust_remote_code)
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{args.out}: {row.local_bytes:,} bytes of weights, {row.checksummed:,} regions proven, {row.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
