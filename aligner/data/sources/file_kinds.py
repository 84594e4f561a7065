"""What kind of data file a file is, by its first bytes, then by its name; and what to do about those that are not read."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 1024
"""Bytes at the start of a file that are inspected."""
JSON_LINES, JSON, CSV, TSV = "jsonl", "json", "csv", "tsv"
PARQUET, ARROW_FILE, ARROW_STREAM = "parquet", "arrow", "arrow stream"
COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\x00", "bzip2": b"BZh", "lz4": b"\x04\x22\x4d\x18"}  # fmt: skip
"""Compression -> first bytes."""
SKIPPED = b"\x2a\x4d\x18"
"""After a byte of 0x50 to 0x5f: a frame without contents, with which zstd's parallel tools begin their files (lz4 has the same)."""
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".lz4")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Names of data files in folders; any of them may be followed by one of PACKED_SUFFIXES."""


class UnreadableFileError(ValueError):
    """A file that holds no rows as it is; the text continues "FILE "."""


@dataclass(frozen=True)
class Refused:
    """A kind of file that holds no rows as it is."""

    description: str
    """Completes "the file is ..."."""
    advice: str
    """What to do; {file} is the file, shell-quoted."""
    beginnings: tuple[bytes, ...]


REFUSED = (
    Refused("a pointer of Git LFS, not the file itself", "run git lfs pull", (b"version https://git-lfs",)),
    Refused("a zip archive", "run unzip {file}, and give what it holds", (b"PK\x03\x04",)),
    Refused("UTF-16 text", "run iconv -f UTF-16 -t UTF-8 {file} > rows.jsonl", (b"\xff\xfe", b"\xfe\xff")),
    Refused("an HTML page", "download the file itself (a hub's raw or resolve link)", (b"<!DOCTYPE", b"<!doctype", b"<html")),
    Refused("a file of Python's pickle or torch", "write its rows as JSONL or parquet", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    Refused("a database of SQLite", "write its rows as JSONL or parquet", (b"SQLite format 3",)),
)  # fmt: skip
TAR = Refused("a tar archive", "run tar -xf {file}, and give what it holds", ())


def kind_of(file: Path, head: bytes) -> str:
    """JSON_LINES, JSON, CSV, TSV, PARQUET, ARROW_FILE, ARROW_STREAM or a key of COMPRESSED.

    Args:
        head: the first HEAD_BYTES of the file, or of what it decompresses to.

    Raises:
        UnreadableFileError: none of them.
    """
    for compression, beginning in COMPRESSED.items():
        if head.startswith(beginning):
            return compression
    if head[1:4] == SKIPPED and 0x50 <= head[0] <= 0x5F:
        return "lz4" if file.name.endswith(".lz4") else "zstd"
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"ARROW1"):
        return ARROW_FILE
    if head.startswith(b"\xff\xff\xff\xff"):
        return ARROW_STREAM
    for refused in REFUSED if head[257:262] != b"ustar" else (TAR,):
        if refused is TAR or head.lstrip().startswith(refused.beginnings):
            raise UnreadableFileError(
                f"is {refused.description}; {refused.advice.replace('{file}', shlex.quote(str(file)))}."
            )
    name = file.name.lower()
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return JSON
    if text.startswith(b"{"):
        return JSON if name.endswith(".json") and not _is_object(text.split(b"\n", 1)[0]) else _lines_or_document(text)
    if name.endswith(".parquet") and head:
        raise UnreadableFileError(
            "is not a parquet file, as its name says: it is damaged, or was not downloaded; fetch it again."
        )
    if name.endswith((".arrow", ".feather")) and head:
        raise UnreadableFileError(
            "is not an Arrow file, as its name says: it is damaged, or was not downloaded; fetch it again."
        )
    return {".csv": CSV, ".tsv": TSV}.get(name[-4:], JSON_LINES)


def _lines_or_document(text: bytes) -> str:
    return JSON if text.split(b"\n", 1)[0].strip() == b"{" else JSON_LINES


def _is_object(line: bytes) -> bool:
    """Whether the line is a row: an object, and not the whole document with its rows in a list."""
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and not (len(value) == 1 and isinstance(next(iter(value.values())), list))
