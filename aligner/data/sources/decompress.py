"""Decompress a whole file into memory: gzip, zstd, xz, bzip2, lz4."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from aligner.data.sources.file_kinds import UnreadableFileError

OPENERS: dict[str, Callable[[Path], bytes]] = {
    "gzip": lambda path: gzip.decompress(path.read_bytes()),
    "xz": lambda path: lzma.decompress(path.read_bytes()),
    "bzip2": lambda path: bz2.decompress(path.read_bytes()),
}


def decompressed(path: Path, compression: str) -> bytes:
    """What the file decompresses to.

    Args:
        compression: a key of `file_kinds.COMPRESSED`.

    Raises:
        UnreadableFileError: it is damaged or cut short.
    """
    try:
        if compression in ("zstd", "lz4"):
            import pyarrow

            with pyarrow.OSFile(str(path)) as file, pyarrow.CompressedInputStream(file, compression) as stream:
                return bytes(stream.read())
        return OPENERS[compression](path)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = str(error) or type(error).__name__
        raise UnreadableFileError(
            f"is compressed ({compression}) and damaged or cut short ({reason}); fetch it again."
        ) from None
